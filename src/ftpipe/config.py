"""The schema of a run: every key, its type, its default and what it means.

One dataclass per ``conf/`` group; all of them are present in every run. A recipe states only what
differs. Values that cannot work are refused in the ``check`` beside the keys they concern.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ftpipe.choices import (
    COLUMNS,
    SERVES,
    Attention,
    Choice,
    Determinism,
    Device,
    Dtype,
    EvalFormat,
    Format,
    Gpu,
    Init,
    Method,
    Offload,
    OnBadRow,
    Operation,
    OverLength,
    Pairs,
    Part,
    Precision,
    Role,
    Strategy,
    TemplateName,
    Use,
    WandbMode,
)
from ftpipe.commits import check_commit
from ftpipe.errors import ConfigError, require, unknown
from ftpipe.evaluate_config import EvaluateConfig
from ftpipe.export_config import ExportConfig
from ftpipe.ppo_config import PpoConfig
from ftpipe.server_config import check_server
from ftpipe.slurm_config import SlurmConfig
from ftpipe.training_config import DpoConfig, RewardConfig, SftConfig


@dataclass
class ModelConfig:
    """The base model: a hub id, a local folder, a GGUF file, or random weights."""

    path: str | None = None  # hub id, local folder or .gguf file; unused when init=random
    revision: str | None = None  # hub commit (40 hex digits); anything else is refused
    init: Init = Init.pretrained  # pretrained: load path; random: draw weights from the seed
    tokenizer: str | None = None  # hub id or folder; null: beside the model; "bytes": one by code
    tokenizer_revision: str | None = None  # hub commit of the tokenizer, if it has its own id
    architecture: dict[str, Any] = field(default_factory=dict)  # config.json keys; smoke shrinks them
    dtype: Dtype = Dtype.auto  # of frozen and full weights; auto: float32 if full, else precision
    new_tokens: list[str] = field(default_factory=list)  # special tokens to add, such as <|prompter|>
    attention: Attention = Attention.sdpa  # attention kernel
    trust_remote_code: bool = False  # run Python code that comes with the model
    license: str | None = None  # its licence as the hub names it (apache-2.0), for what is exported

    def check(self) -> None:
        if self.init is Init.pretrained and not self.path:
            raise ConfigError(
                "model.path is not set; give a hub id, a folder or a .gguf file, "
                "or choose a model by name with model=NAME."
            )
        if self.init is Init.random and "model_type" not in self.architecture:
            raise ConfigError(
                "model.init=random needs model.architecture.model_type (such as llama); "
                "conf/model/ has complete examples."
            )
        for key in ("revision", "tokenizer_revision"):
            check_commit(f"model.{key}", getattr(self, key))
        new = self.new_tokens
        once = len(set(new)) == len(new)
        require(once and all(map(str.strip, new)), "model.new_tokens", new, "texts, none empty or twice")


@dataclass
class AdapterConfig:
    """What is trained: all weights, or a low-rank adapter (arXiv:2106.09685, 2305.14314)."""

    method: Method = Method.full  # full: all weights; lora: adapter; qlora: adapter on a 4-bit base
    r: int = 16  # rank of the update
    alpha: int = 32  # the update is scaled by alpha / r
    rslora: bool = False  # scaled by alpha / sqrt(r) instead (arXiv:2312.03732)
    dora: bool = False  # besides, learns how long each row of a matrix is (DoRA, arXiv:2402.09353)
    dropout: float = 0.0  # on the adapter's input, in [0, 1)
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # module names, or all-linear
    dtype: Dtype = Dtype.float32  # of the adapter's weights
    quantization: str = "nf4"  # 4-bit code of qlora's base: nf4 or fp4
    double_quantization: bool = True  # quantise the quantisation constants as well

    def check(self) -> None:
        require(self.r >= 1, "adapter.r", self.r, "at least 1")
        require(self.alpha >= 1, "adapter.alpha", self.alpha, "at least 1")
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "in [0, 1)")
        require(
            self.quantization in ("nf4", "fp4"),
            "adapter.quantization",
            self.quantization,
            "nf4 or fp4",
        )
        require(bool(self.targets), "adapter.targets", self.targets, "module names or all-linear")
        require(self.dtype is not Dtype.auto, "adapter.dtype", self.dtype, "a dtype, such as float32")
        for key in ("rslora", "dora"):
            idle = self.method is Method.full and getattr(self, key)
            require(not idle, f"adapter.{key}", getattr(self, key), "false with adapter.method=full")


@dataclass
class SourceConfig:
    """One set of rows in a published schema."""

    format: Format = MISSING  # the schema of its rows
    path: str = MISSING  # hub id, or a file: .json, .jsonl, .parquet, .csv; the text ones also .gz
    revision: str | None = None  # hub commit (40 hex digits); needed for a hub id
    subset: str | None = None  # which configuration of a hub dataset, where it has several
    split: str = "train"  # which split of a hub dataset
    file: str | None = None  # of a hub dataset: this file alone, whatever its splits; null: split
    columns: dict[str, str] = field(default_factory=dict)  # the schema's name -> this set's (a.b: in a)
    use: list[Use] = field(default_factory=list)  # what it serves; empty: what its format is for
    part: Part = Part.auto  # auto: divided by data.validation; else all of it goes there
    rows: int | None = None  # only the first so many rows of the file (OASST: messages)
    count: int | None = None  # only so many examples, drawn by the seed; null: all
    weight: float = 1.0  # how often a training row is seen: 0.5: half of them, 2: each one twice
    languages: list[str] = field(default_factory=list)  # OASST: of the first prompt; empty: all
    top_k: int | None = None  # OASST: threads through replies of the best so many alone; null: all.
    # A group to compare keeps all its ranked replies, as Open-Assistant's own filter has it
    ties: Choice = Choice.keep  # pairs in published order whose scores are equal
    license: str | None = None  # its licence as the hub names it (cc-by-4.0), for what is exported

    def check(self, key: str) -> None:
        for name in ("format", "path"):
            if getattr(self, name) in (None, MISSING):
                raise ConfigError(f"{key}.{name} is not set.")
        check_commit(f"{key}.revision", self.revision)
        for name in ("rows", "count", "top_k"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{key}.{name}", value, "at least 1, or null")
        require(0 < self.weight <= 100, f"{key}.weight", self.weight, "above 0, up to 100")
        check_columns(f"{key}.columns", self.format, self.columns)
        known = SERVES[self.format]
        for use in self.use:
            allowed = f"{', '.join(known)}, which {self.format} rows can serve"
            require(use in known, f"{key}.use", self.use, allowed)


@dataclass
class EvalSetConfig:
    """A set of evaluation questions that no training row may hold."""

    format: EvalFormat = MISSING  # mmlu, gsm8k, questions (MT-bench, Vicuna), or text
    path: str = MISSING  # hub id, or a file: .json, .jsonl, .csv, .txt; mmlu also .zip or a folder
    revision: str | None = None  # hub commit (40 hex digits); needed for a hub id
    subset: str | None = None  # which configuration of a hub dataset, where it has several
    split: str = "test"  # which split of a hub dataset
    columns: list[str] = field(default_factory=list)  # text: the columns to search for; empty: all

    def check(self, key: str) -> None:
        for name in ("format", "path"):
            if getattr(self, name) in (None, MISSING):
                raise ConfigError(f"{key}.{name} is not set.")
        check_commit(f"{key}.revision", self.revision)


@dataclass
class DataConfig:
    """From rows to token ids with a mask of what is learned."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)  # by a name of your choosing
    template: TemplateName = TemplateName.tokenizer  # how turns become text
    learn: list[Role] = field(default_factory=lambda: [Role.assistant])  # whose turns are learned
    max_length: int = 1024  # tokens per row
    over_length: OverLength = OverLength.error  # longer rows: leave out or refuse if more than max_lost;
    # or by your word: drop, truncate at the end, split a conversation between its exchanges
    max_lost: float | None = None  # share of learned tokens that may be lost; null: 1% under error
    on_bad_row: OnBadRow = OnBadRow.error  # a row that cannot be used: refuse, or leave out and count
    max_skipped: float = 0.05  # share of rows that on_bad_row=skip may leave out
    validation: float = 0.05  # held out: a share below 1, or a number of rows from 1 on; 0: none
    duplicates: Choice = Choice.drop  # rows equal to an earlier or a held-out one
    near_duplicates: float | None = None  # Jaccard similarity from which rows are duplicates; null: off
    decontaminate: dict[str, EvalSetConfig] = field(default_factory=dict)  # sets to search rows for
    ngram: int = 13  # words in a row that an evaluation question and a training row may not share
    pairs: Pairs = Pairs.all  # of K ranked replies: every pair, or neighbours in rank only
    packing: bool = False  # several rows in one sequence of max_length, none attending another

    def check(self) -> None:
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}")
        for name, questions in self.decontaminate.items():
            questions.check(f"data.decontaminate.{name}")
        require(self.max_length >= 8, "data.max_length", self.max_length, "at least 8")
        lost = self.max_lost
        require(lost is None or 0 <= lost <= 1, "data.max_lost", lost, "in [0, 1], or null")
        require(0 <= self.max_skipped <= 1, "data.max_skipped", self.max_skipped, "in [0, 1]")
        whole = self.validation < 1 or self.validation % 1 == 0
        require(
            self.validation >= 0 and whole,
            "data.validation",
            self.validation,
            "a share in [0, 1) or a whole number of rows",
        )
        near = self.near_duplicates
        allowed = "above 0.3, up to 1, or null"
        require(near is None or 0.3 < near <= 1, "data.near_duplicates", near, allowed)
        require(5 <= self.ngram <= 100, "data.ngram", self.ngram, "from 5 to 100 words")
        require(bool(self.learn), "data.learn", self.learn, "at least one role")


@dataclass
class SeedsConfig:
    """Instructions to evolve: the first words of the user in each row of a published schema."""

    format: Format = Format.alpaca  # the schema of its rows
    path: str | None = None  # hub id, or a file, as in data.sources
    revision: str | None = None  # hub commit (40 hex digits); needed for a hub id
    split: str = "train"  # which split of a hub dataset
    file: str | None = None  # of a hub dataset: this file alone, whatever its splits; null: split
    columns: dict[str, str] = field(default_factory=dict)  # the schema's name -> this set's name
    rows: int | None = None  # only the first so many rows

    def check(self) -> None:
        check_commit("evolve.seeds.revision", self.revision)
        check_columns("evolve.seeds.columns", self.format, self.columns)
        rows = self.rows
        require(rows is None or rows >= 1, "evolve.seeds.rows", rows, "at least 1, or null")


@dataclass
class EvolveConfig:
    """Evol-Instruct (arXiv:2304.12244): instructions made harder and rarer by a model."""

    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    on_bad_row: OnBadRow = OnBadRow.error  # a seed row that cannot be used: refuse, or leave out
    rounds: int = 4  # generations at most of each seed
    operations: list[Operation] = field(default_factory=lambda: list(Operation))  # drawn uniformly
    keep_seeds: bool = True  # seeds are rows of the set too, with their own answers if they have any
    judge: bool = True  # ask the model whether an evolved instruction equals its parent
    min_kept: float = 0.1  # share of evolutions that must survive, else it is an error
    url: str | None = None  # of an OpenAI-compatible server, up to /v1; null: the run's own model
    model: str | None = None  # the model's name at that server; with url, it decides the fingerprint
    api_key_env: str | None = None  # NAME of the environment variable with the key, never the key
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 0.95  # of the likeliest tokens, those that make up this share
    max_tokens: int = 2048  # of an instruction or an answer; what is cut there is eliminated
    concurrency: int = 8  # requests at once; rows of a batch where the model is the run's own
    timeout: float = 300.0  # seconds for one answer of a server
    retries: int = 8  # more attempts after a timeout, a 429 or a 5xx, each after a longer wait

    def check(self) -> None:
        self.seeds.check()
        require(self.rounds >= 1, "evolve.rounds", self.rounds, "at least 1")
        distinct = len(set(self.operations)) == len(self.operations)
        require(
            bool(self.operations) and distinct,
            "evolve.operations",
            [str(operation) for operation in self.operations],
            f"one or more of {', '.join(Operation)}, each once",
        )
        require(0 <= self.min_kept <= 1, "evolve.min_kept", self.min_kept, "in [0, 1]")
        require(self.temperature >= 0, "evolve.temperature", self.temperature, "0 or more")
        require(0 < self.top_p <= 1, "evolve.top_p", self.top_p, "in (0, 1]")
        require(self.timeout > 0, "evolve.timeout", self.timeout, "above 0")
        require(self.retries >= 0, "evolve.retries", self.retries, "0 or more")
        for key in ("max_tokens", "concurrency"):
            require(getattr(self, key) >= 1, f"evolve.{key}", getattr(self, key), "at least 1")
        check_server("evolve", self.url, self.model, self.api_key_env)


@dataclass
class ShardingConfig:
    """What the strategies that shard can do besides; ``combinations`` says what goes with what."""

    offload_optimizer: Offload = Offload.none  # zero1-3: optimiser states in host memory; zero3: or NVMe
    offload_parameters: Offload = Offload.none  # zero3: weights in host memory or NVMe; fsdp: cpu, with
    # gradients and optimiser states
    nvme: str | None = None  # folder on a local NVMe disk, for what is offloaded there
    reshard: bool = (
        True  # fsdp: free a layer's weights after its forward pass; false: more memory, fewer
    )
    # messages, as zero2
    bucket: int = 100_000_000  # zero1-3: weights of one message; less needs less memory

    def check(self) -> None:
        disk = Offload.nvme in (self.offload_optimizer, self.offload_parameters)
        if disk and not self.nvme:
            raise ConfigError("launch.sharding.nvme is not set; name a folder on a local NVMe disk.")
        if self.nvme and not disk:
            raise ConfigError(
                f"launch.sharding.nvme={self.nvme} would be read by nothing; set "
                "launch.sharding.offload_optimizer=nvme or offload_parameters=nvme."
            )
        require(self.bucket >= 1000, "launch.sharding.bucket", self.bucket, "at least 1000")


@dataclass
class LaunchConfig:
    """Where it runs. Changes speed and rounding, not what is computed."""

    device: Device = Device.auto  # auto: cuda where there is a GPU
    processes: int = 1  # ranks on each node
    nodes: int = 1  # machines that share a training; more than one in jobs of Slurm alone
    micro_batch_size: int = 4  # rows per forward pass of one rank; batch_size is a multiple
    precision: Precision = Precision.auto  # auto: bf16 on cuda, fp32 on cpu
    # ddp: every rank holds everything; zero1, zero2, zero3 (arXiv:1910.02054): ranks share out optimiser
    # states, gradients too, weights too; fsdp: all three, by PyTorch (arXiv:2304.11277, FSDP2)
    strategy: Strategy = Strategy.ddp
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    offload_activations: bool = False  # with gradient_checkpointing: what it keeps lies in host memory
    tf32: bool = False  # faster, rounder float32 products on Ampere GPUs and later
    threads: int | None = None  # CPU threads of one rank; null: the cores, shared out
    workers: int | None = None  # processes that prepare data; null: one a core, up to 16
    gpu: str | None = None  # `plan` says whether it fits on h100, a100-80g, rtx-4090, ... (choices.py's
    # Gpu); null: on this machine's
    gpu_price: float | None = None  # of an hour of one GPU, in your currency; null: no cost is shown
    utilization: float = 0.35  # share of a GPU's peak speed that `plan` reckons with
    timeout_minutes: float = 30.0  # a rank that waits so long for the others ends the stage
    slurm: SlurmConfig = field(default_factory=SlurmConfig)  # what jobs ask for (slurm_config.py)

    def nodes_of(self, stage: str) -> int:
        """Return how many nodes share a stage that runs on all ranks."""
        job = self.slurm.stages.get(stage)
        return (job and job.nodes) or self.nodes

    def check(self) -> None:
        require(self.processes >= 1, "launch.processes", self.processes, "at least 1")
        require(self.nodes >= 1, "launch.nodes", self.nodes, "at least 1")
        minutes = self.timeout_minutes
        require(minutes > 0, "launch.timeout_minutes", minutes, "above 0")
        self.slurm.check()
        require(
            self.micro_batch_size >= 1,
            "launch.micro_batch_size",
            self.micro_batch_size,
            "at least 1",
        )
        require(self.threads is None or self.threads >= 1, "launch.threads", self.threads, "at least 1")
        if self.gpu is not None and self.gpu not in list(Gpu):
            raise ConfigError("launch.gpu: " + unknown("GPU", self.gpu, list(Gpu)))
        price, share = self.gpu_price, self.utilization
        require(price is None or price >= 0, "launch.gpu_price", price, "0 or more, or null")
        require(0 < share <= 1, "launch.utilization", share, "in (0, 1]")
        workers = self.workers
        require(workers is None or workers >= 1, "launch.workers", workers, "at least 1, or null")
        self.sharding.check()


@dataclass
class TrackingConfig:
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    wandb: WandbMode = WandbMode.disabled
    project: str = "ftpipe"
    entity: str | None = None  # wandb user or team; null: your default
    tags: list[str] = field(default_factory=list)
    trace_first: int = 10  # steps on record from the first, at full precision (trace.jsonl)
    trace_every: int = 100  # and then one in so many

    def check(self) -> None:
        require(self.trace_first >= 0, "tracking.trace_first", self.trace_first, "0 or more")
        require(self.trace_every >= 1, "tracking.trace_every", self.trace_every, "at least 1")


@dataclass
class RunConfig:
    """Everything a run needs. Written once, resolved, as ``run.yaml``; ranks read that file."""

    name: str = "run"  # shown in logs and trackers; the recipe's name
    stages: list[str] = field(default_factory=lambda: ["prepare", "sft"])  # in order
    seed: int = 0  # of every random number
    seeds: int = 1  # runs with so many seeds from there on, reported as one: mean and deviation
    determinism: Determinism = Determinism.seeded  # off: kernels by trial; seeded: the same each time;
    # strict: deterministic ones alone, or none (determinism.py)
    output: str = "outputs"  # folder that holds artifacts and runs
    smoke: bool = False  # tiny random model of the same architecture, sample rows, few steps
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evolve: EvolveConfig = field(default_factory=EvolveConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: naming the key, its value and what is allowed.
        """
        plain_name = re.fullmatch(r"[\w+-][\w.+-]*", self.name) is not None  # of a folder
        require(plain_name, "name", repr(self.name), "letters, digits, and . _ + -")
        require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")
        most = 2**32 - self.seed
        require(
            1 <= self.seeds <= min(1000, most), "seeds", self.seeds, "from 1 to 1000, below 2^32 - seed"
        )
        training = (self.sft, self.reward, self.dpo, self.ppo)
        others = (self.model, self.adapter, self.data, self.evolve, self.launch, self.tracking)
        for part in (*others, *training, self.evaluate, self.export):
            part.check()
        require(
            not (self.data.packing and self.sft.group_by_length),
            "sft.group_by_length",
            self.sft.group_by_length,
            "false with data.packing=true, whose sequences are all of one length",
        )
        if not self.data.sources and "evolve" not in self.stages:
            raise ConfigError("data.sources is empty; choose a dataset with data=NAME.")
        if "evolved" in self.data.sources and "evolve" in self.stages:
            raise ConfigError(
                "data.sources.evolved has the name of what the stage 'evolve' makes; rename it."
            )
        if "merge" in self.stages and self.adapter.method is Method.full:
            raise ConfigError(
                "stages: 'merge' writes an adapter into its base, but adapter.method=full makes none; "
                "leave 'merge' out."
            )
        if "ppo" in self.stages and self.launch.precision is Precision.fp16:
            raise ConfigError(
                "launch.precision=fp16 is too coarse for ppo, whose ratios are near 1; set bf16 or fp32."
            )
        for trained in training:
            if trained.group in self.stages:
                nodes = self.launch.nodes_of(trained.group)
                trained.check_batch(self.launch.micro_batch_size, self.launch.processes, nodes)


def check_columns(key: str, format_: Format, columns: dict[str, str]) -> None:
    """Refuse a name that the format does not read: its column would be renamed for nothing."""
    for name in columns:
        if name not in COLUMNS[format_]:
            why = unknown("column", name, COLUMNS[format_])
            raise ConfigError(f"{key}: the format {format_} has {why}")
