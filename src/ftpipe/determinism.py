"""Where chance comes from, and how fixed the arithmetic is: all of it is decided here.

Every random number of a run is a function of ``seed``:

* weights drawn for a random base, LoRA's A and the like, dropout, noise on embeddings: the generators
  of Python, numpy and torch (on every device), which ``begin`` seeds before a stage draws a number
* a new score head, the answers of ``evolve`` and of ``ppo``: generators of their own, seeded by what
  they are for, so that neither batches nor ranks change them (``reward/head.py``,
  ``evolve/local.py``, ``ppo/generation.py``)
* the order of rows: numpy's, by seed and epoch (``sequences.Order``); what is held out, drawn or
  repeated: digests of the rows themselves with the seed (``data/select.py``)
* hashes of Python's sets: ``PYTHONHASHSEED``, set by the driver; no worker process draws anything

The same numbers in another order of addition give another sum, so a kernel decides results, too:

==========  ========================================================================================
off         kernels are chosen for speed, by trial (cuDNN); sums come in any order
seeded      the default. Kernels are chosen the same way each time, cuBLAS has a fixed workspace, cuDNN
            is deterministic; some of PyTorch's own CUDA kernels add in an order of chance
strict      besides, PyTorch uses deterministic kernels alone and ends a run that has none
            (pytorch.org/docs/stable/notes/randomness.html), flash attention's backward pass is the
            deterministic one, NCCL adds in the order of a ring, and the threads of a CPU are stated
==========  ========================================================================================

``docs/reproducibility.md`` says what was measured to be equal to what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.choices import Determinism

if TYPE_CHECKING:
    from ftpipe.config import RunConfig

NO_KERNEL = "does not have a deterministic implementation"  # in torch's words


def environment(how: Determinism) -> dict[str, str]:
    """Return what the ranks' environment must say before their libraries are loaded."""
    fixed = {"PYTHONHASHSEED": "0"}
    if how is not Determinism.off:
        # docs.nvidia.com/cuda/cublas: results are reproducible with several streams
        fixed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if how is Determinism.strict:
        fixed |= {
            "FLASH_ATTENTION_DETERMINISTIC": "1",  # transformers/modeling_flash_attention_utils.py
            "NCCL_ALGO": "Ring",
            "NCCL_PROTO": "Simple",
        }
    return fixed


def begin(cfg: RunConfig, seed: int | None = None) -> None:
    """Seed all generators and choose the kernels. Call before a stage draws its first number.

    Args:
        seed: None: that of the run.
    """
    import torch
    from transformers import set_seed

    set_seed(cfg.seed if seed is None else seed)
    torch.use_deterministic_algorithms(cfg.determinism is Determinism.strict)
    torch.backends.cudnn.deterministic = cfg.determinism is not Determinism.off
    torch.backends.cudnn.benchmark = cfg.determinism is Determinism.off


def refusal(error: Exception) -> str | None:
    """Return the sentence for an operation that strict cannot have, or None for another error."""
    said = str(error)
    if NO_KERNEL not in said:
        return None
    return (
        f"determinism=strict: {said.split(NO_KERNEL)[0].strip()} {NO_KERNEL} on this device; set "
        "determinism=seeded, or another model.attention, adapter.method or launch.device."
    )
