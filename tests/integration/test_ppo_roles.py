"""PPO's roles on one base: each says what it says as a model of its own, and only two of them learn."""

from __future__ import annotations

import gc
import json
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from ftpipe import artifacts, cli, schema
from ftpipe.artifacts import Artifact
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, ModelError
from ftpipe.ppo.layout import Answer, answer_logits, lay, state_values
from ftpipe.ppo.roles import Role, Roles, body_of, load
from ftpipe.reward import model as reward_model
from ftpipe.stages import ppo

pytestmark = pytest.mark.usefixtures("in_process")
slow = pytest.mark.slow

WORDS = (
    *("recipe=tiny", "stages=[prepare,sft,reward]", "launch.threads=1", "data=own", "data.validation=4"),
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations, prompts]}}",
    *("sft.max_steps=2", "sft.samples=0", "sft.learning_rate=1e-2", "sft.eval_every=0"),
    *("reward.max_steps=2", "reward.batch_size=4", "reward.learning_rate=1e-2", "ppo.ignore_gate=true"),
    *("ppo.batch_size=4", "ppo.max_new_tokens=6", "ppo.max_steps=2", "ppo.learning_rate=1e-2"),
)
MARKS = ("data.template=oasst", "model.new_tokens=['<|prompter|>','<|assistant|>']")
FROM_BASE = ("stages=[prepare,reward]", "reward.start=model", "ppo.start=model")
MERGED = ("stages=[prepare,sft,merge,reward]",)
BF16 = ("launch.precision=bf16",)
BF16_NOISE = 3e-2  # a third of it was seen; two roles are 20 to 60 % apart
LIGHT: list[tuple[str, ...]] = [(), ("adapter=qlora", *MARKS)]
HEAVY: list[tuple[str, ...]] = [
    FROM_BASE,
    (*FROM_BASE, *MARKS),
    MERGED,
    (*MERGED, *MARKS, "adapter=qlora"),
    ("adapter=qlora",),
    MARKS,
    (*MARKS, "model.architecture.tie_word_embeddings=true"),
    BF16,
    (*BF16, "adapter=qlora"),
    (*BF16, "adapter.dtype=bfloat16"),
    ("adapter.dropout=0.5", "model.architecture.attention_dropout=0.5"),
    ("reward.ensemble=2",),
    ("ppo.gradient_checkpointing=true",),
]
ON_ONE_BASE = [*LIGHT, *(pytest.param(words, marks=slow) for words in HEAVY)]
HEAD_ROWS = "lm_head.token_adapter.trainable_tokens_delta.value_function"
every_form = pytest.mark.parametrize(
    "words",
    [*ON_ONE_BASE, pytest.param(("adapter=full",), marks=slow)],
    ids=lambda words: " ".join(words) or "lora",
)


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where artifacts of the other tests lie, to use them again."""
    kept = tmp_path_factory.getbasetemp() / "roles"
    kept.mkdir(exist_ok=True)
    monkeypatch.chdir(kept)


@dataclass(frozen=True)
class Made:
    """A finished run: its configuration, its artifacts by stage and what ``load`` takes."""

    cfg: RunConfig
    by_stage: dict[str, Artifact]

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(str(self.by_stage["prepare"].path / "tokenizer"))

    @property
    def inputs(self) -> dict[str, Artifact]:
        """Artifacts by kind, the latest of each, as a stage behind them gets them."""
        found = {artifact.kind: artifact for artifact in self.by_stage.values()}
        gone = "policy" if str(self.cfg.ppo.start) == "model" else "base_model"
        return {kind: artifact for kind, artifact in found.items() if kind != gone}

    def roles(self) -> Roles:
        return load(self.cfg, self.inputs, self.tokenizer)

    @property
    def whole(self) -> Path:
        """Return where the weights lie that the roles share."""
        return self.by_stage["merge" if "merge" in self.by_stage else "model"].path

    @property
    def policy(self) -> Path | None:
        """Return the policy's adapter as it comes in, where it is one."""
        came = self.inputs.get("policy")
        return came.path if came and (came.path / "adapter_config.json").is_file() else None

    def autocast(self) -> AbstractContextManager[Any]:
        half = str(self.cfg.launch.precision) == "bf16"
        return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()


def made(*words: str) -> Made:
    assert cli.main(["run", *WORDS, *words]) == 0
    run = max(Path("outputs/runs").glob("*/artifacts.json"), key=lambda path: path.stat().st_mtime_ns)
    listed: dict[str, str] = json.loads(run.read_text())
    root = Path("outputs/artifacts").resolve()
    found = {stage: artifacts.open_artifact(root / name) for stage, name in listed.items()}
    return Made(schema.load(run.with_name("run.yaml")), found)


def plain(made: Made, adapter: Path | None, scored: bool = False, whole: Path | None = None) -> Any:
    """Return a model of its own, as transformers and PEFT load it."""
    half = str(made.cfg.launch.precision) == "bf16"
    full = str(made.cfg.adapter.method) == "full"
    dtype = torch.bfloat16 if half and not full else torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if str(made.cfg.adapter.method) == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["score", "lm_head"],
        )
    kind: Any = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
    options |= {"num_labels": 1} if scored else {}
    model = kind.from_pretrained(str(whole or made.whole), **options)
    if len(made.tokenizer) > model.get_input_embeddings().weight.shape[0]:
        before = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(len(made.tokenizer), mean_resizing=False)
        with torch.no_grad():  # an adapter brings its rows; without one they are the mean of the others
            for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                if part is not None:
                    part.weight[before:] = part.weight[:before].float().mean(0).to(dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    for module in model.modules():  # bitsandbytes' inference layout on some CPUs rounds otherwise
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def answers(made: Made, count: int = 3) -> list[Answer]:
    """Return prompts and answers of unlike lengths, the tokenizer's last tokens among them."""
    draw = random.Random(count)
    last = len(made.tokenizer) - 1
    rows = [[draw.randrange(40, last) for _ in range(5 + 3 * n)] + [last - n] for n in range(count)]
    return [Answer(tuple(row[: 3 + n]), tuple(row[3 + n :]), False) for n, row in enumerate(rows)]


def alone(model: Any, one: Answer) -> Tensor:
    """Return logits before each token of an answer, from a row by itself."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([[*one.prompt, *one.tokens]])).logits[0]
    return logits[len(one.prompt) - 1 : -1].float()


def same(got: Tensor, right: Tensor, tolerance: float) -> None:
    """See that two results are alike as a whole: processors round a single bf16 number far apart."""
    norm = torch.linalg.vector_norm
    assert norm(got - right) <= tolerance * norm(right)


@dataclass(frozen=True)
class Oracle:
    """The roles as models of their own."""

    made: Made
    policy: Any
    reference: Any
    value: Any  # a body
    rewards: reward_model.RewardModel

    def compare(self, roles: Roles, role: str, tolerance: float) -> None:
        """See that a role says what its model says."""
        rows = answers(self.made)
        pad = self.made.tokenizer.pad_token_id
        batch = lay(rows, pad)
        with torch.no_grad(), self.made.autocast():
            if role == "reward":
                assert roles.rewards is not None
                got_MB = roles.rewards.members(batch.ids_BL, batch.attended_BL)
                right = []
                for one in rows:
                    ids = torch.tensor([[*one.prompt, *one.tokens]])
                    right.append(self.rewards.members(ids, torch.ones_like(ids)))
                same(got_MB, torch.cat(right, 1), tolerance)
                return
            with roles.acting(Role(role)) as model:
                if role == "value":
                    got_BT = state_values(body_of(model), roles.value_head, batch)
                    for b, one in enumerate(rows):
                        ids = torch.tensor([[*one.prompt, *one.tokens]])
                        hidden_TH = self.value(ids).last_hidden_state[0, len(one.prompt) - 1 : -1]
                        with torch.autocast("cpu", enabled=False):
                            values_T = roles.value_head(hidden_TH.float())[:, 0]
                        got_T = got_BT[b, : len(values_T)]
                        same(got_T, values_T, tolerance)
                    return
                got_BTV = answer_logits(model, batch, 1.0)
                expected: Any = getattr(self, role)
                for b, one in enumerate(rows):
                    right_TV = alone(expected, one)
                    got_TV = got_BTV[b, : len(right_TV), : right_TV.shape[1]]
                    same(got_TV, right_TV, tolerance)


def moved(roles: Roles) -> None:
    """Move all that is trained, the two roles by other amounts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in (Role.policy, Role.value):
            for weight in roles.trained(role).values():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)


def value_of(made: Made, roles: Roles) -> Any:
    """Return the value function's body as a model of its own, with the weights that it has now."""
    held = roles.trained(Role.value)
    if roles.shared is None:
        scored = plain(made, None, scored=True, whole=made.inputs["reward_model"].path)
        named = dict(scored.named_parameters())
        for name, weight in held.items():
            if not name.startswith("head."):
                named[name].data = weight.detach().clone()
        return scored.base_model
    member = next(iter(reward_model.stated(made.inputs["reward_model"].path, made.tokenizer)[0]))
    adapter = made.inputs["reward_model"].path / member
    scored = plain(made, adapter, scored=True)
    named = dict(scored.named_parameters())
    for name, weight in held.items():
        if not name.startswith("head."):
            named[name.replace(".value_function", ".default")].data = weight.detach().clone()
    return scored.get_base_model().base_model


def oracle(made: Made, roles: Roles, out: Path) -> Oracle:
    roles.save(out, first=True)
    full = roles.shared is None
    policy = plain(made, None if full else out, whole=out if full else None)
    came = made.inputs["policy"].path if full and "policy" in made.inputs else None
    reference = plain(made, made.policy, whole=came)
    rewards = reward_model.load(made.inputs["reward_model"].path, made.tokenizer)
    return Oracle(made, policy, reference, value_of(made, roles), rewards)


@every_form
def test_after_any_switches_each_role_says_what_it_says_alone(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    found = made(*words)
    roles = found.roles()
    moved(roles)
    alone = oracle(found, roles, tmp_path)
    tolerance = BF16_NOISE if "launch.precision=bf16" in words else 1e-5
    draw, names = random.Random(3), ["policy", "reference", "value", "reward"]
    for role in [*draw.sample(names, 4), *draw.choices(names, k=6)]:
        alone.compare(roles, role, tolerance)


@every_form
def test_it_starts_as_the_policy_that_came_in_and_the_value_as_its_reward(
    words: tuple[str, ...],
) -> None:
    found = made(*words)
    roles = found.roles()
    rows = answers(found)
    pad = found.tokenizer.pad_token_id
    batch = lay(rows, pad)
    rewards = reward_model.load(found.inputs["reward_model"].path, found.tokenizer)
    with torch.no_grad(), found.autocast():
        said = {}
        for role in (Role.policy, Role.reference):
            with roles.acting(role) as model:
                said[role] = answer_logits(model, batch, 1.0)
        assert torch.equal(said[Role.policy], said[Role.reference])
        came = found.inputs["policy"].path if roles.shared is None else None
        expected = plain(found, found.policy, whole=came)
        tolerance = BF16_NOISE if "launch.precision=bf16" in words else 1e-5
        for b, one in enumerate(rows):
            right_TV = alone(expected, one)
            got_TV = said[Role.policy][b, : len(right_TV), : right_TV.shape[1]]
            same(got_TV, right_TV, tolerance)
        # V before one token more is V after the whole row, where the reward model scores
        longer = lay([Answer(one.prompt, (*one.tokens, pad), True) for one in rows], pad)
        with roles.acting(Role.value) as model:
            values_BT = state_values(body_of(model), roles.value_head, longer)
        for b, one in enumerate(rows):
            ids = torch.tensor([[*one.prompt, *one.tokens]])
            score = rewards.members(ids, torch.ones_like(ids))[0, 0].item()  # the first of an ensemble
            assert values_BT[b, len(one.tokens)].item() == pytest.approx(
                score, rel=tolerance, abs=10 * tolerance
            )


def trained(roles: Roles, role: Role) -> set[int]:
    return {id(weight) for weight in roles.trained(role).values()}


def everything(roles: Roles) -> list[tuple[str, torch.nn.Parameter]]:
    """Return all weights of all roles and rewards, by name; each once."""
    found: dict[int, tuple[str, torch.nn.Parameter]] = {}
    modules: list[tuple[str, torch.nn.Module]] = [("head", roles.value_head)]
    modules += [(str(role), model) for role, model in roles.models.items()]
    for part in ("models", "heads"):
        parts = enumerate(getattr(roles.rewards, part, ()))
        modules += [(f"reward_{part}_{number}", one) for number, one in parts]
    for prefix, module in modules:
        for name, weight in module.named_parameters():
            found.setdefault(id(weight), (f"{prefix}/{name}", weight))
    return list(found.values())


@every_form
def test_only_the_role_that_acts_gets_gradients(words: tuple[str, ...]) -> None:
    found = made(*words)
    roles = found.roles()
    rows = answers(found)
    batch = lay(rows, found.tokenizer.pad_token_id)
    learned = trained(roles, Role.policy) | trained(roles, Role.value)
    assert not trained(roles, Role.policy) & trained(roles, Role.value)
    assert roles.trained(Role.reference) == {}
    roles.train(True)
    for role in (Role.policy, Role.reference, Role.value, Role.policy, Role.value):
        with roles.acting(role) as model, found.autocast():
            wanting = {name for name, weight in everything(roles) if weight.requires_grad}
            if role is Role.value:
                loss = state_values(body_of(model), roles.value_head, batch).square().sum()
            elif role is Role.policy:
                loss = answer_logits(model, batch, 1.0).logsumexp(-1).square().sum()
            else:
                with torch.no_grad():
                    answer_logits(model, batch, 1.0)
                    if roles.rewards is not None:
                        roles.rewards.members(batch.ids_BL, batch.attended_BL)
                continue
            loss.backward()
        for name, weight in everything(roles):
            if id(weight) in trained(roles, role):
                assert weight.grad is not None and weight.grad.isfinite().all(), name
            else:
                assert weight.grad is None, name
            weight.grad = None
        assert roles.shared is None or roles.shared.model.active_adapter == "default"
        after = {name for name, weight in everything(roles) if weight.requires_grad}
        for flagged in (wanting, after):  # the value's rows of the output head see no gradient
            seen = {name for name in flagged if not name.endswith(HEAD_ROWS)}
            assert seen == {name for name, weight in everything(roles) if id(weight) in learned}


def digest(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        (),
        *(
            pytest.param(words, marks=slow)
            for words in [
                ("adapter=qlora",),
                MARKS,
                (*FROM_BASE, *MARKS),
                MERGED,
                ("adapter=full",),
                ("ppo.gradient_checkpointing=true",),
                ("reward.ensemble=2", "ppo.weight_decay=0.1"),
            ]
        ),
    ],
    ids=lambda words: " ".join(words) or "lora",
)
def test_over_a_run_policy_and_value_move_and_nothing_else(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[Roles, dict[str, Tensor]]] = []

    def keep(*given: Any) -> Roles:
        roles = load(*given)
        kept.append((roles, digest(dict(everything(roles)))))
        return roles

    monkeypatch.setattr(ppo, "load", keep)
    stages = next((word for word in words if word.startswith("stages")), "stages=[prepare,sft,reward]")
    made(*words, stages.replace("]", ",ppo]"), f"seed={len(' '.join(words)) + 1}")
    ((roles, before),) = kept
    learned = trained(roles, Role.policy) | trained(roles, Role.value)
    dead = {name for name in before if name.endswith("lm_head.weight")}  # never seen where it is whole
    for name, weight in everything(roles):
        if id(weight) not in learned:
            assert torch.equal(weight, before[name]), name
        elif name not in dead:
            assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize("words", [(), pytest.param(("reward.ensemble=2",), marks=slow)])
def test_with_one_base_there_is_one_copy_of_its_weights(words: tuple[str, ...]) -> None:
    found = made(*words)
    gc.collect()
    shape = plain(found, None).model.embed_tokens.weight.shape
    gc.collect()
    kind = torch.nn.Parameter  # asked by type: isinstance wakes properties of whatever is alive
    already = {id(one) for one in gc.get_objects() if issubclass(type(one), kind)}
    roles = found.roles()
    gc.collect()
    new = [one for one in gc.get_objects() if issubclass(type(one), kind)]
    places = {one.data_ptr() for one in new if id(one) not in already and one.shape == shape}
    assert len(places) == 2  # embeddings and output head
    assert len({id(model) for model in roles.models.values()}) == 1
    assert roles.shared is not None
    adapters = {name.rsplit(".", 2)[-2] for name, _ in everything(roles) if "lora_A" in name}
    rewards = {f"reward_model_{number}" for number in range(1 + len(words))}
    assert adapters == {"default", "reference", "value_function", *rewards}


@pytest.mark.parametrize("words", [(), pytest.param(("adapter=full",), marks=slow)])
def test_recomputed_activations_give_the_same_gradients(words: tuple[str, ...]) -> None:
    found: list[dict[str, Tensor]] = []
    for on in (False, True):
        world = made(*words)
        world.cfg.ppo.gradient_checkpointing = on
        roles = world.roles()
        moved(roles)
        roles.train(True)
        assert (
            any(
                module.gradient_checkpointing
                for module in roles.models[Role.policy].modules()
                if (hasattr(module, "gradient_checkpointing"))
            )
            is on
        )
        batch = lay(answers(world), world.tokenizer.pad_token_id)
        with roles.acting(Role.policy) as model:
            answer_logits(model, batch, 1.0).logsumexp(-1).square().mean().backward()
        with roles.acting(Role.value) as model:
            state_values(body_of(model), roles.value_head, batch).square().mean().backward()
        gradients = {}
        for role in (Role.policy, Role.value):
            for name, weight in roles.trained(role).items():
                assert weight.grad is not None, name
                gradients[f"{role}/{name}"] = weight.grad
        found.append(gradients)
    kept, recomputed = found
    assert sum(float(one.abs().sum()) for one in kept.values()) > 1
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("words", [(), pytest.param(("adapter=full",), marks=slow)])
def test_told_to_start_from_the_policy_the_value_is_0(words: tuple[str, ...]) -> None:
    found = made(*words, "ppo.value_start=policy")
    roles = found.roles()
    batch = lay(answers(found), found.tokenizer.pad_token_id)
    with torch.no_grad(), roles.acting(Role.value) as model:
        values_BT = state_values(body_of(model), roles.value_head, batch)
        hidden_BLH = body_of(model)(batch.ids_BL, batch.attended_BL).last_hidden_state
    assert torch.equal(values_BT, torch.zeros_like(values_BT))
    with torch.no_grad(), roles.acting(Role.reference) as model:
        given = {"input_ids": batch.ids_BL, "attention_mask": batch.attended_BL}
        reference_BLH = body_of(model)(**given).last_hidden_state
    torch.testing.assert_close(hidden_BLH, reference_BLH)  # from the policy, not from the base


def test_padding_on_either_side_changes_no_reward() -> None:
    found = made()
    roles = found.roles()
    assert roles.rewards is not None
    one = [5, 9, 60, 61, 62]
    left = torch.tensor([[0, 0, 0, *one], [*range(50, 58)]])
    right = torch.tensor([[*one, 0, 0, 0], [*range(50, 58)]])
    before = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    scores = [
        roles.rewards.members(left, before),
        roles.rewards.members(right, before.flip(1)),
    ]
    torch.testing.assert_close(scores[0], scores[1])


def other_base() -> Made:
    """Return a policy merged after its reward model was trained as an adapter on the unmerged base."""
    return made("stages=[prepare,sft,reward,merge]")


def test_a_reward_model_of_another_base_is_a_model_of_its_own() -> None:
    found = other_base()
    roles = found.roles()
    assert isinstance(roles.rewards, reward_model.RewardModel)
    expected = reward_model.load(found.inputs["reward_model"].path, found.tokenizer)
    batch = lay(answers(found), found.tokenizer.pad_token_id)
    got = roles.rewards.members(batch.ids_BL, batch.attended_BL)
    assert torch.equal(got, expected.members(batch.ids_BL, batch.attended_BL))
    with torch.no_grad(), roles.acting(Role.value) as model:
        assert not state_values(body_of(model), roles.value_head, batch).any()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "qlora"),
        pytest.param("double_quantization", "false", marks=slow),
        pytest.param("precision", "bf16", marks=slow),
    ],
)
def test_a_reward_model_held_in_another_way_is_a_model_of_its_own(key: str, value: str) -> None:
    found = made()
    if key == "precision":
        found.cfg.launch.precision = type(found.cfg.launch.precision)(value)
    elif key == "method":
        found.cfg.adapter.method = type(found.cfg.adapter.method)(value)
    else:
        found = made("adapter=qlora")
        found.cfg.adapter.double_quantization = False
    roles = found.roles()
    assert isinstance(roles.rewards, reward_model.RewardModel)
    ids = torch.tensor([[*range(40, 60)]])
    expected = reward_model.load(found.inputs["reward_model"].path, found.tokenizer)
    mask = torch.ones_like(ids)
    assert torch.equal(roles.rewards.members(ids, mask), expected.members(ids, mask))


@slow
def test_adapters_of_unlike_rank_and_target_share_one_base() -> None:
    small = made("adapter.r=4", "adapter.alpha=4", "adapter.targets=[q_proj,up_proj]")
    found = made(*FROM_BASE)
    inputs = {**found.inputs, "reward_model": small.inputs["reward_model"]}
    roles = load(found.cfg, inputs, found.tokenizer)
    assert not isinstance(roles.rewards, reward_model.RewardModel) and roles.rewards is not None
    batch = lay(answers(found), found.tokenizer.pad_token_id)
    expected = reward_model.load(small.inputs["reward_model"].path, found.tokenizer)
    for _ in range(2):
        with torch.no_grad(), roles.acting(Role.policy) as model:
            answer_logits(model, batch, 1.0)
        torch.testing.assert_close(
            roles.rewards.members(batch.ids_BL, batch.attended_BL),
            expected.members(batch.ids_BL, batch.attended_BL),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("words", [(), pytest.param(("adapter=full",), marks=slow)])
def test_a_reward_model_of_another_vocabulary_is_refused(words: tuple[str, ...]) -> None:
    found = made(*words)
    tokenizer = found.tokenizer
    tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(ModelError, match="was trained with another vocabulary than the tokenizer"):
        load(found.cfg, found.inputs, tokenizer)


@pytest.mark.parametrize("kind", ["other base", pytest.param("full", marks=slow)])
def test_a_value_cannot_start_from_a_reward_model_of_another_form(kind: str) -> None:
    found = other_base()
    if kind == "full":
        found.cfg.adapter.method = type(found.cfg.adapter.method)("full")
    found.cfg.ppo.value_start = type(found.cfg.ppo.value_start)("reward")
    with pytest.raises(ConfigError, match=r"ppo\.value_start=reward needs a reward model on the base"):
        found.roles()


def test_an_adapter_that_comes_in_cannot_be_trained_whole() -> None:
    found = made()
    found.cfg.adapter.method = type(found.cfg.adapter.method)("full")
    with pytest.raises(ConfigError, match="put 'merge' before this stage"):
        found.roles()


@pytest.mark.parametrize("harm", ["lora_A", "score", "unknown"])
def test_an_incomplete_reward_adapter_is_refused(harm: str, tmp_path: Path) -> None:
    found = made()
    came = found.inputs["reward_model"]
    for file in came.path.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    if harm == "unknown":
        weights["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(2, 2)
    else:
        weights = {name: one for name, one in weights.items() if harm not in name}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    inputs = {**found.inputs, "reward_model": replace(came, path=tmp_path)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir()
    with pytest.raises(ModelError, match="delete the folder to build it again"):
        load(found.cfg, inputs, found.tokenizer)
