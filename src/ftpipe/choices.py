"""The words a configuration may use, and what the rows of each format can serve."""

from __future__ import annotations

from enum import StrEnum


class Determinism(StrEnum):
    off = "off"
    seeded = "seeded"
    strict = "strict"


class Init(StrEnum):
    pretrained = "pretrained"
    random = "random"


class Method(StrEnum):
    full = "full"
    lora = "lora"
    qlora = "qlora"


class Format(StrEnum):
    alpaca = "alpaca"
    dolly = "dolly"
    evol_instruct = "evol_instruct"
    guanaco = "guanaco"
    hh_rlhf = "hh_rlhf"
    messages = "messages"
    oasst = "oasst"
    preference = "preference"
    prompt_completion = "prompt_completion"
    prompts = "prompts"
    sharegpt = "sharegpt"
    ultrafeedback = "ultrafeedback"
    unpaired = "unpaired"


class Use(StrEnum):
    demonstrations = "demonstrations"
    preferences = "preferences"
    unpaired = "unpaired"
    prompts = "prompts"


class Part(StrEnum):
    auto = "auto"
    train = "train"
    validation = "validation"
    test = "test"


class EvalFormat(StrEnum):
    mmlu = "mmlu"
    gsm8k = "gsm8k"
    questions = "questions"
    text = "text"


class Choice(StrEnum):
    keep = "keep"
    drop = "drop"


class Pairs(StrEnum):
    all = "all"
    adjacent = "adjacent"


class TemplateName(StrEnum):
    tokenizer = "tokenizer"
    plain = "plain"
    alpaca = "alpaca"
    guanaco = "guanaco"
    vicuna = "vicuna"
    wizardlm = "wizardlm"
    oasst = "oasst"
    chatml = "chatml"
    hh = "hh"
    llama2 = "llama2"
    llama3 = "llama3"
    mistral = "mistral"
    zephyr = "zephyr"


class Role(StrEnum):
    system = "system"
    user = "user"
    assistant = "assistant"


class OverLength(StrEnum):
    error = "error"
    drop = "drop"
    truncate = "truncate"
    split = "split"  # type: ignore[assignment]  # the word for it; nobody splits this string


class OnBadRow(StrEnum):
    error = "error"
    skip = "skip"


class Optimizer(StrEnum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_32bit = "paged_adamw_32bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    adafactor = "adafactor"
    rmsprop = "rmsprop"
    sgd = "sgd"


class Scheduler(StrEnum):
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    linear = "linear"
    cosine = "cosine"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Strategy(StrEnum):
    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp = "fsdp"


class Offload(StrEnum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(StrEnum):
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class Gpu(StrEnum):
    """GPUs that a run may be planned for (fit/gpus.py)."""

    h200 = "h200"
    h100 = "h100"
    h100_pcie = "h100-pcie"
    a100_80g = "a100-80g"
    a100_40g = "a100-40g"
    l40s = "l40s"
    l4 = "l4"
    a10g = "a10g"
    rtx_4090 = "rtx-4090"
    rtx_3090 = "rtx-3090"
    v100_32g = "v100-32g"
    v100_16g = "v100-16g"
    t4 = "t4"


class Operation(StrEnum):
    constraints = "constraints"
    deepening = "deepening"
    concretizing = "concretizing"
    reasoning = "reasoning"
    breadth = "breadth"


class WandbMode(StrEnum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


# What the rows of a format can serve; the first is what they are for.
SERVES: dict[Format, tuple[Use, ...]] = {
    **{
        single: (Use.demonstrations, Use.prompts)
        for single in (
            Format.alpaca,
            Format.dolly,
            Format.evol_instruct,
            Format.guanaco,
            Format.messages,
            Format.prompt_completion,
            Format.sharegpt,
        )
    },
    Format.oasst: (Use.demonstrations, Use.preferences, Use.prompts),
    **{
        paired: (Use.preferences, Use.unpaired, Use.demonstrations, Use.prompts)
        for paired in (Format.hh_rlhf, Format.preference, Format.ultrafeedback)
    },
    Format.unpaired: (Use.unpaired, Use.demonstrations, Use.prompts),
    Format.prompts: (Use.prompts,),
}


# The columns that a format reads; it leaves all others alone.
COLUMNS: dict[Format, tuple[str, ...]] = {
    Format.alpaca: ("instruction", "input", "output", "instances"),
    Format.dolly: ("instruction", "context", "response"),
    Format.evol_instruct: ("instruction", "input", "output", "conversations", "evolved_from"),
    Format.guanaco: ("text",),
    Format.hh_rlhf: ("chosen", "rejected"),
    Format.messages: ("messages", "conversations"),
    Format.oasst: (
        *("message_id", "parent_id", "message_tree_id", "text", "role", "lang", "rank"),
        *("review_result", "deleted", "synthetic", "tree_state", "prompt"),
    ),
    Format.preference: (
        *("prompt", "chosen", "rejected", "conversations", "score_chosen", "score_rejected"),
    ),
    Format.prompt_completion: ("prompt", "completion"),
    Format.prompts: ("prompt", "reference"),
    Format.sharegpt: ("conversations",),
    Format.ultrafeedback: (
        *("prompt", "chosen", "rejected", "conversations", "score_chosen", "score_rejected"),
        *("scores", "metadata", "instruction", "completions"),
    ),
    Format.unpaired: ("prompt", "completion", "messages", "conversations", "label"),
}


class Start(StrEnum):
    policy = "policy"
    model = "model"


class PreferenceLoss(StrEnum):
    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"
    robust = "robust"
    exo_pair = "exo_pair"
    nca_pair = "nca_pair"
    bco_pair = "bco_pair"
    sppo_hard = "sppo_hard"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    discopop = "discopop"
    sigmoid_norm = "sigmoid_norm"
    kto = "kto"
    orpo = "orpo"
    simpo = "simpo"


class Normalize(StrEnum):
    chosen = "chosen"
    replies = "replies"
    demonstrations = "demonstrations"


class Weighting(StrEnum):
    tokens = "tokens"
    sequences = "sequences"


class Algorithm(StrEnum):
    ppo = "ppo"
    rloo = "rloo"
    grpo = "grpo"


class RewardKind(StrEnum):
    model = "model"
    function = "function"


class ValueStart(StrEnum):
    auto = "auto"
    reward = "reward"
    policy = "policy"


class MmluMethod(StrEnum):
    hendrycks = "hendrycks"
    qlora = "qlora"


class Gguf(StrEnum):
    """How a GGUF file stores its matrices (llama.cpp's names)."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_1 = "q4_1"
    q4_0 = "q4_0"


class Quantized(StrEnum):
    """How llmcompressor finds the 4 bits of a matrix."""

    gptq = "gptq"
    awq = "awq"


class State(StrEnum):
    """What lies at the place of an artifact."""

    made = "made"
    damaged = "damaged"  # there, but its manifest cannot be read
    building = "in the making"  # half made, by a process that lives
    begun = "begun"  # half made, by a process that has ended
    missing = "missing"


class ServeEngine(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


class Ended(StrEnum):
    """Why an answer ended; the first two are OpenAI's words."""

    stop = "stop"
    length = "length"
    cancelled = "cancelled"
