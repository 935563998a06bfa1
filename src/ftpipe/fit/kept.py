"""What a layer keeps for its backward pass, in bytes: the forward pass gone through on sizes alone.

Korthikanti et al. 2022 (arXiv:2205.05198, section 4) count this for one layer in 16 bits. Here it is
counted as transformers, PEFT and bitsandbytes compute it: every operation names the tensors that
autograd saves, and one that several operations save is counted once. Widths are elements per token.

Under autocast (trained weights are float32, products are in 16 bits) a product keeps a 16-bit copy of
its input, and of its weight too. What differs on a GPU: norms, powers and softmax give float32 under
autocast, and a dropout keeps a byte an element rather than its noise
(docs.pytorch.org/docs/stable/amp.html).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ftpipe.choices import Attention
from ftpipe.fit.shapes import Linear, Shape

FLOAT = 4  # bytes of float32
HALF = 2  # and of 16 bits


@dataclass(frozen=True)
class Numbers:
    """In which dtypes a pass computes, and on what.

    Attributes:
        compute: bytes of what products give: 4, or 2 under autocast.
        stored: bytes of the base's weights outside of 4-bit layers, and so of the residual stream.
        trained: all weights are trained.
        adapted: names within a layer of the linear layers that have an adapter.
        r, adapter: its rank, and bytes of its weights.
        dropout: the adapter drops some of its input.
        drops: the model's own dropouts are on.
        masked: rows are padded, so attention takes a mask.
        gpu: computed on CUDA.
    """

    compute: int
    stored: int
    trained: bool
    adapted: Collection[str] = ()
    r: int = 0
    adapter: int = FLOAT
    dropout: bool = False
    drops: bool = True
    masked: bool = True
    gpu: bool = False
    attention: Attention = Attention.sdpa


@dataclass
class Kept:
    """Bytes: for each token, for each pair of tokens of a row, and whatever the batch is."""

    token: float = 0.0
    square: float = 0.0
    fixed: float = 0.0

    def of(self, rows: int, length: int) -> float:
        """Return the bytes of ``rows`` rows of ``length`` tokens."""
        return rows * length * (self.token + length * self.square) + self.fixed


@dataclass(eq=False)
class _Tensor:
    width: float
    bytes: int
    kept: bool = field(default=False)


class _Pass:
    """One layer's forward pass."""

    def __init__(self, shape: Shape, numbers: Numbers) -> None:
        self.shape, self.numbers, self.kept = shape, numbers, Kept()
        self.by_name = {one.name: one for one in shape.linears}

    def keep(self, tensor: _Tensor) -> None:
        if not tensor.kept:
            tensor.kept = True
            self.kept.token += tensor.width * tensor.bytes

    def cast(self, tensor: _Tensor, to: int) -> _Tensor:
        return tensor if tensor.bytes == to else _Tensor(tensor.width, to)

    def dropped(self, tensor: _Tensor, on: bool) -> _Tensor:
        """A dropout keeps its noise, or on a GPU one byte an element."""
        if not on:
            return tensor
        self.keep(_Tensor(tensor.width, 1 if self.numbers.gpu else tensor.bytes))
        return _Tensor(tensor.width, tensor.bytes)

    def linear(self, one: Linear, x: _Tensor) -> _Tensor:
        n = self.numbers
        if n.trained:
            self.keep(self.cast(x, n.compute))
            if n.compute != n.stored:
                self.kept.fixed += one.ins * one.outs * n.compute
        elif one.name in n.adapted:
            # PEFT casts to the adapter's dtype, autocast back (peft/tuners/lora/layer.py)
            x = self.dropped(self.cast(x, n.adapter), n.dropout)
            self.keep(self.cast(x, n.compute))
            self.keep(_Tensor(n.r, n.compute))
            if n.adapter != n.compute:
                self.kept.fixed += n.r * (one.ins + one.outs) * n.compute
        return _Tensor(one.outs, n.compute)

    def norm(self, x: _Tensor) -> _Tensor:
        n, whole = self.numbers, _Tensor(x.width, FLOAT)
        if self.shape.rms:
            wide = x if x.bytes == FLOAT else whole
            self.keep(wide)
            self.keep(_Tensor(1, FLOAT))
            if n.trained:
                self.keep(_Tensor(x.width, FLOAT))
            return _Tensor(x.width, max(n.stored, x.bytes))
        wide = whole if n.gpu and x.bytes != FLOAT else x
        self.keep(wide)
        self.keep(_Tensor(2, FLOAT if n.gpu else x.bytes))
        return _Tensor(x.width, wide.bytes)

    def attend(self, x: _Tensor) -> _Tensor:
        """Return what the output projection takes."""
        s, n = self.shape, self.numbers
        *inputs, _ = (one for one in s.linears if one.name in self._attention())
        projected = [self.linear(one, x) for one in inputs]
        kernel, dropping = self._kernel()
        # without a mask the fused kernel takes fewer heads of keys as they are
        repeated = n.masked or kernel != "flash"
        wide = s.attention if repeated else s.key_heads * s.head
        grouped = s.key_heads != s.heads
        rotated = s.rotary != ""
        if kernel == "math":
            bytes_ = FLOAT
            q, k, v = (_Tensor(s.attention, FLOAT) for _ in range(3))
        elif s.fused and s.kernel != "eager" and kernel == "flash":
            bytes_ = n.compute
            fused = projected[0]
            q = _Tensor(s.attention, bytes_) if rotated else fused
            k = _Tensor(s.attention, bytes_) if rotated else fused
            v = fused
            if grouped and repeated:
                k, v = _Tensor(s.attention, bytes_), _Tensor(s.attention, bytes_)
        else:
            bytes_ = n.compute
            q, k = _Tensor(s.attention, bytes_), _Tensor(wide, bytes_)
            v = _Tensor(wide, bytes_)
        for one in (q, k, v):
            self.keep(one)
        out = _Tensor(s.attention, n.compute)
        if kernel == "flash":
            self.keep(_Tensor(s.heads, FLOAT))
            self.keep(out)
            self.kept.square += n.compute if n.masked else 0
            # heads put together of rotated and other parts lie one after another, so they are copied
            return _Tensor(out.width, out.bytes) if s.rotary == "part" else out
        self._scores(kernel, dropping)
        return out

    def _attention(self) -> set[str]:
        """Return the names of the linear layers of attention: all but the MLP's."""
        mlp = 3 if self.shape.gated else 2
        return {one.name for one in self.shape.linears[:-mlp]}

    def _kernel(self) -> tuple[str, bool]:
        """Return how attention is computed, and whether it drops some of it."""
        s, n = self.shape, self.numbers
        dropping = bool(n.drops and s.dropout[1])
        if n.attention is Attention.eager or s.kernel == "eager":
            return "eager", dropping
        if n.attention is Attention.sdpa and (s.kernel == "math" or (dropping and not n.gpu)):
            return "math", dropping
        return "flash", dropping

    def _scores(self, kernel: str, dropping: bool) -> None:
        """The probabilities of attention: from the softmax, then in the dtype of values."""
        s, n = self.shape, self.numbers
        own = kernel == "eager" and s.rounded and not n.gpu
        softmax = max(n.compute, n.stored) if own else FLOAT
        bytes_ = FLOAT if kernel == "math" else n.compute
        self.kept.square += s.heads * softmax
        if dropping:
            self.kept.square += s.heads * ((1 if n.gpu else bytes_) + bytes_)
        elif bytes_ != softmax:
            self.kept.square += s.heads * bytes_

    def mlp(self, x: _Tensor) -> _Tensor:
        s, n = self.shape, self.numbers
        *ups, down = s.linears[-3 if s.gated else -2 :]
        raised = [self.linear(one, x) for one in ups]
        self.keep(raised[0])  # of the activation
        inside = _Tensor(s.inner, n.compute)
        if s.gated:
            self.keep(inside)
            self.keep(raised[1])
            inside = _Tensor(s.inner, n.compute)
        elif s.gelu:  # 0.5 x (1 + tanh(...)), with x cubed: float32 under a GPU's autocast
            cubed = FLOAT if n.gpu else n.compute
            if n.gpu and n.compute != FLOAT:
                self.keep(_Tensor(s.inner, cubed))
            self.keep(_Tensor(s.inner, cubed))  # tanh
            self.keep(_Tensor(s.inner, cubed))  # 1 + tanh
            self.keep(_Tensor(s.inner, n.compute))  # x / 2
            inside = _Tensor(s.inner, cubed)
        return self.linear(down, inside)

    def added(self, x: _Tensor, part: _Tensor) -> _Tensor:
        part = self.dropped(part, bool(self.numbers.drops and self.shape.dropout[0]))
        return _Tensor(x.width, max(x.bytes, part.bytes))

    def run(self) -> Kept:
        s, n = self.shape, self.numbers
        out = s.linears[-4 if s.gated else -3]
        x = _Tensor(s.hidden, n.stored)
        normed = self.norm(x)
        attended = self.linear(out, self.attend(normed))
        if s.parallel:
            other = self.norm(x) if s.parallel == 2 else normed
            self.mlp(other)
        else:
            x = self.added(x, attended)
            self.added(x, self.mlp(self.norm(x)))
        return self.kept


def layer(shape: Shape, numbers: Numbers) -> Kept:
    """Return what one layer keeps when its forward pass is made for a backward pass."""
    return _Pass(shape, numbers).run()


def behind(shape: Shape, numbers: Numbers) -> Kept:
    """Return what the last norm keeps."""
    last = _Pass(shape, numbers)
    last.norm(_Tensor(shape.hidden, numbers.stored))
    return last.kept
