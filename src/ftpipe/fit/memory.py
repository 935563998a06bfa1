"""The most memory a training needs on one rank, by part, from what is held and what is in passing.

What is held: weights, gradients and the optimiser's states, shared out as in ``costs.py``. In passing:
what layers keep for the backward pass (``kept.py``), and what the loss and one layer's backward pass
need beside it. A step is followed through its moments; the largest is the peak:

- the end of the forward pass: all that layers keep, and the loss;
- the loss's backward pass;
- a layer's backward pass: what the layers below it keep, the gradients of those above, and what one
  layer needs in passing;
- the gradient of the embedding;
- the optimiser's step.

PPO has a moment more, in which answers are drawn with a cache of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ftpipe import costs
from ftpipe.choices import Method, Offload, Optimizer, Strategy
from ftpipe.fit import kept
from ftpipe.fit.kept import FLOAT
from ftpipe.fit.training import Training, optimizer_bytes

# TRL 1.16's fused head: logits are computed in tiles of so many tokens and words
# (trl/kernels/chunked_logprob.py)
TOKENS, WORDS = 4096, 32768
# bytes of a tile's element besides its product: a GPU computes it in place; elsewhere PyTorch's
# operations make copies in float32: z, a difference and its exponential; in the backward pass y, z, log
# p, p, the gradient, the target's place (one byte) and two products
FORWARD_TILE, BACKWARD_TILE = 3 * FLOAT, 7 * FLOAT + 1


@dataclass(frozen=True)
class Parts:
    """Bytes on one rank at one moment."""

    weights: float = 0.0
    adapters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    loss: float = 0.0
    rollouts: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return sum(float(getattr(self, one.name)) for one in fields(self))


@dataclass(frozen=True)
class Peak:
    """What a step needs at most, and at which moment.

    Attributes:
        moments: the total of each moment.
    """

    parts: Parts
    moment: str
    moments: dict[str, float]

    @property
    def total(self) -> float:
        return self.parts.total


def peak(t: Training) -> Peak:
    """Return what a training needs at most, on the rank that needs the most."""
    held = _held(t)
    every = _moments(t, held)
    most = max(every, key=lambda name: every[name].total)
    return Peak(every[most], most, {name: parts.total for name, parts in every.items()})


@dataclass(frozen=True)
class Held:
    """Bytes that last from step to step, and those of all gradients.

    Attributes:
        share: of a rank in gradients that are shared out.
    """

    weights: float
    adapters: float
    optimizer: float
    gradients: float
    buffers: float
    share: float


def _width(t: Training) -> int:
    return t.numbers.stored if t.method is Method.full else t.numbers.adapter


def _held(t: Training) -> Held:
    n, shape = t.numbers, t.shape
    width = _width(t)
    moments = _optimizer(t)
    trained = float(t.trained)
    parted = costs.states(t.strategy, trained, 0.0, t.ranks, width, 0.0, moments)
    # under ZeRO an optimiser's state includes a float32 copy of the weights
    shares_weights = t.strategy in (Strategy.zero3, Strategy.fsdp)
    share = 1 / t.ranks if shares_weights else 1.0
    shares_gradients = shares_weights or t.strategy is Strategy.zero2
    frozen_copies = t.frozen * shape.total * n.stored * (share if t.strategy is Strategy.fsdp else 1.0)
    if t.method is Method.full:
        weights, adapters = parted.weights if t.trains else t.base_bytes, 0.0
    else:
        weights = t.base_bytes * share
        adapters = (t.copies * t.adapter + t.fresh) * n.adapter * share
    weights += frozen_copies
    optimizer, gradients = parted.optimizer, parted.gradients
    offloaded, placed = t.offload
    if placed is not Offload.none:
        weights = adapters = optimizer = gradients = 0.0
    if offloaded is not Offload.none:
        optimizer = 0.0
    return Held(
        weights=weights,
        adapters=adapters,
        optimizer=optimizer,
        gradients=gradients,
        buffers=_buffers(t),
        share=1 / t.ranks if shares_gradients else 1.0,
    )


def _optimizer(t: Training) -> float:
    """Return bytes that the optimiser keeps of a trained weight, on average.

    transformers has bitsandbytes keep the embedding's moments in float32; small tensors are, too.
    """
    per = optimizer_bytes(t.optimizer, t.numbers.gpu, _width(t))
    eight = t.optimizer in (Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit)
    if not eight or t.method is not Method.full or not t.trained:
        return per
    tables = (t.shape.vocabulary + t.shape.places) * t.shape.hidden * t.learned
    whole = optimizer_bytes(
        Optimizer.adamw if t.optimizer is Optimizer.adamw_8bit else Optimizer.paged_adamw_32bit,
        t.numbers.gpu,
    )
    return per + (whole - per) * min(1.0, tables / t.trained)


def _buffers(t: Training) -> float:
    """Return what messages between ranks take.

    DDP copies gradients into buckets (torch.nn.parallel, gradient_as_bucket_view=False), PPO into one
    message; ZeRO has two buckets in flight and, at stage 3, up to ten of gathered weights
    (``launch_settings.py``); FSDP2 gathers two layers, and the rest of the model for as long as the
    pass lasts (``sharding.py``).
    """
    if t.ranks == 1:
        return 0.0
    n, shape = t.numbers, t.shape
    bucket = min(t.bucket, max(t.trained, 1)) * FLOAT
    match t.strategy:
        case Strategy.ddp:
            return float(t.trained * _width(t))
        case Strategy.zero1 | Strategy.zero2:
            return 2.0 * bucket
        case Strategy.zero3:
            return 2.0 * bucket + float(min(10 * t.bucket, t.body) * n.stored)
        case Strategy.fsdp:
            layers = 2 if t.reshard else shape.layers
            root = t.body - shape.layers * shape.layer
            return float((layers * shape.layer + root) * n.compute)


def _moments(t: Training, held: Held) -> dict[str, Parts]:
    rest = {
        "weights": held.weights,
        "adapters": held.adapters,
        "optimizer": held.optimizer,
        "buffers": held.buffers,
    }
    before = held.gradients if t.accumulated > 1 else 0.0  # of micro-batches before this one
    passing = _Passing.of(t)
    if not t.trains:
        loss = passing.loss_forward
        return {"forward": Parts(**rest, activations=passing.transient, loss=loss)}
    found = {
        "loss": Parts(**rest, gradients=before, activations=passing.forward, loss=passing.loss_forward),
        "loss backward": Parts(
            **rest,
            gradients=max(before, 0.0),
            activations=passing.backward,
            loss=passing.loss_backward + passing.head_gradient * held.share,
        ),
    }
    layer_gradient = _layer_gradient(t, held)
    head = max(0.0, held.gradients - layer_gradient * t.shape.layers)
    head_first = min(head, passing.head_gradient * held.share)
    for done in (1, t.shape.layers):
        below = t.shape.layers - done
        own = head_first + layer_gradient * done
        found[f"layer {'last' if done == 1 else 'first'}"] = Parts(
            **rest,
            gradients=max(before, own),
            activations=passing.resting(below) + passing.layer + passing.transient,
        )
    found["embedding"] = Parts(**rest, gradients=held.gradients, activations=passing.embedding_gradient)
    found["step"] = Parts(**rest, gradients=held.gradients, activations=_step(t, held))
    if t.name == "ppo":
        found["rollout"] = Parts(**rest, rollouts=_rollout(t), activations=passing.drawing)
    return found


def _layer_gradient(t: Training, held: Held) -> float:
    if t.method is Method.full:
        return t.shape.layer * _width(t) * held.share
    return t.adapter / t.shape.layers * _width(t) * held.share


def _step(t: Training, held: Held) -> float:
    """Return what the optimiser's step needs in passing.

    Fused AdamW, SGD and bitsandbytes work in place. RMSprop takes a root of all moments at once on a GPU
    (torch.optim, foreach), of one tensor elsewhere; Adafactor makes an update of one tensor's size
    twice.
    """
    if t.method is Method.full:
        table = t.shape.vocabulary * t.shape.hidden
        largest = float(max(table, *(one.weights for one in t.shape.linears)))
    else:
        largest = t.adapter / t.shape.layers
    if t.optimizer is Optimizer.rmsprop:
        return held.gradients if t.numbers.gpu else largest * FLOAT
    return 2.0 * largest * FLOAT if t.optimizer is Optimizer.adafactor else 0.0


@dataclass(frozen=True)
class _Passing:
    """Bytes that come and go within a step.

    Attributes:
        forward, backward: what all layers keep when the loss is computed, and when its gradient is.
        layer: what one layer keeps beyond what rests between the passes.
        transient: what a layer's backward pass makes besides.
        below: what rests of one layer.
        fixed: what rests whatever the layers.
    """

    forward: float
    backward: float
    layer: float
    transient: float
    below: float
    fixed: float
    loss_forward: float
    loss_backward: float
    head_gradient: float
    embedding_gradient: float
    drawing: float

    def resting(self, layers: int) -> float:
        return self.below * layers + self.fixed

    @classmethod
    def of(cls, t: Training) -> _Passing:
        n, shape, tokens = t.numbers, t.shape, t.rows * t.length
        one = kept.layer(shape, n)
        if t.strategy is Strategy.fsdp:  # weights are gathered in the dtype of products, and freed
            one.fixed = 0.0
        whole = one.of(t.rows, t.length)
        stream = tokens * shape.hidden * n.stored
        last = kept.behind(shape, n).of(t.rows, t.length)
        fixed = last + tokens * shape.hidden * max(n.stored, n.compute)
        if t.checkpointing:
            below = 0.0 if t.offloaded_activations else float(stream)
            casts = one.fixed * shape.layers  # autocast holds them until the forward pass is over
            forward, backward, layer = (
                below * shape.layers + fixed + casts,
                below * shape.layers + fixed,
                whole,
            )
        else:
            below, layer = whole, 0.0
            forward = backward = whole * shape.layers + fixed
        losses = _loss(t)
        table = shape.vocabulary * shape.hidden * FLOAT
        trained_head = t.method is Method.full
        return cls(
            forward=forward,
            backward=backward,
            layer=layer,
            transient=_transient(t),
            below=below,
            fixed=fixed,
            loss_forward=losses[0],
            loss_backward=losses[1],
            head_gradient=float(table if trained_head and t.headed else 0),
            embedding_gradient=float(table if trained_head and shape.tied and t.headed else 0),
            drawing=_drawing(t),
        )


def _transient(t: Training) -> float:
    """Return what the backward pass of a layer's MLP makes: gradients of its branches, and of one
    weight.
    """
    n, shape, tokens = t.numbers, t.shape, t.rows * t.length
    branches = tokens * shape.inner * n.compute * (3 if shape.gated else 2)
    stream = 2 * tokens * shape.hidden * n.stored
    largest = max(one.ins * one.outs for one in shape.linears)
    if t.method is Method.full:
        weight = largest * (n.compute + (FLOAT if n.compute != FLOAT else 0))
    elif t.method is Method.qlora:
        weight = largest * n.compute  # 4 bits made whole for a product
    else:
        weight = 0
    return float(branches + stream + weight)


def _loss(t: Training) -> tuple[float, float]:
    """Return what the loss needs in its forward and in its backward pass."""
    n, shape = t.numbers, t.shape
    if t.name == "reward":
        return 0.0, 0.0
    if t.name == "ppo":
        return _logits(t)
    tokens = t.rows * (t.length - 1)
    product = min(tokens, TOKENS) * WORDS * n.compute  # as wide, however few the words
    tile = min(tokens, TOKENS) * min(shape.vocabulary, WORDS)
    hidden = tokens * shape.hidden * FLOAT
    words = min(shape.vocabulary, WORDS) * shape.hidden
    cast = words * n.compute if n.compute != n.stored else 0
    ahead, back = (0, 0) if n.gpu else (FORWARD_TILE, BACKWARD_TILE)
    return product + tile * ahead + cast, product + tile * back + hidden + cast


def _logits(t: Training) -> tuple[float, float]:
    """PPO's own: all logits of the answers, in the dtype of products and in float32."""
    n, shape = t.numbers, t.shape
    words = t.rows * t.new * shape.vocabulary
    whole = words * (FLOAT + (n.compute if n.compute != FLOAT else 0))
    return float(whole + words * FLOAT), float(words * 4 * FLOAT)


def _rollout(t: Training) -> float:
    """Return the keys and values of all answers that are drawn at once."""
    shape = t.shape
    pairs = 2 * shape.layers * shape.key_heads * shape.head
    return float(t.answers * t.length * pairs * t.numbers.compute)


def _drawing(t: Training) -> float:
    """Return what drawing takes besides: a prompt's pass, or probabilities of one token in float64."""
    n, shape = t.numbers, t.shape
    prompt = t.answers * max(0, t.length - t.new) * (3 * shape.inner + 4 * shape.hidden) * n.compute
    return float(max(prompt, t.answers * shape.vocabulary * (3 * 8 + FLOAT)))
