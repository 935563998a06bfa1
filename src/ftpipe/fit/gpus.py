"""GPUs by name: memory as nvidia-smi shows it, and peak speed from their vendor's data sheets.

Speed is of dense products with float32 accumulation, without sparsity, in 10^12 operations a second: of
16-bit numbers on tensor cores, of float32 rounded to TF32 there, and of float32 outside of them. T4 and
V100 have neither bfloat16 nor TF32.

- H100 SXM, H200: NVIDIA H100 and H200 Tensor Core GPU data sheets (1,979 and 989 with sparsity: half of
  it; 67). H100 PCIe: the same (1,513 and 756 with sparsity; 51). A100: data sheet (312, 156; 19.5).
  L40S: data sheet (362, 183; 91.6). L4: data sheet (242 and 120 with sparsity; 30.3). A10G: data sheet
  (70, 35; 35). V100 SXM2: data sheet (125; 15.7). T4: data sheet (65; 8.1).
- RTX 4090, 3090: NVIDIA Ada and Ampere GA102 architecture white papers (165.2, 82.6; 82.6 and 71, 35.6;
  35.6).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ftpipe.choices import Gpu, Precision

# GiB that CUDA's context and kernels take, as nvidia-smi shows of a process that holds nothing
RESERVED = 1.0
FRAGMENTED = 0.95  # share of the rest that PyTorch's allocator can hand out before it finds no room


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        memory: GiB.
        half, tf32, single: 10^12 operations a second in such numbers; 0: not known, or there are none.
        bf16: it computes in bfloat16, not in float16 alone.
    """

    memory: float
    half: float = 0.0
    tf32: float = 0.0
    single: float = 0.0
    bf16: bool = True

    def speed(self, precision: Precision, tf32: bool) -> float:
        """Return the speed of a training's products; 0: not known.

        Args:
            precision: ``auto`` is bf16.
            tf32: float32 may be rounded so (``launch.tf32``).
        """
        if precision is Precision.fp32:
            return (self.tf32 if tf32 else 0.0) or self.single
        return self.half if self.bf16 or precision is Precision.fp16 else 0.0

    @property
    def usable(self) -> float:
        """Return the bytes that a training may take."""
        return (self.memory - RESERVED) * FRAGMENTED * 2**30


CARDS = {
    Gpu.h200: Card(140.4, 989.5, 494.5, 67.0),
    Gpu.h100: Card(79.6, 989.5, 494.5, 67.0),
    Gpu.h100_pcie: Card(79.6, 756.5, 378.0, 51.0),
    Gpu.a100_80g: Card(80.0, 312.0, 156.0, 19.5),
    Gpu.a100_40g: Card(40.0, 312.0, 156.0, 19.5),
    Gpu.l40s: Card(45.0, 362.0, 183.0, 91.6),
    Gpu.l4: Card(22.5, 121.0, 60.0, 30.3),
    Gpu.a10g: Card(22.5, 70.0, 35.0, 35.0),
    Gpu.rtx_4090: Card(24.0, 165.2, 82.6, 82.6),
    Gpu.rtx_3090: Card(24.0, 71.0, 35.6, 35.6),
    Gpu.v100_32g: Card(32.0, 125.0, single=15.7, bf16=False),
    Gpu.v100_16g: Card(16.0, 125.0, single=15.7, bf16=False),
    Gpu.t4: Card(15.0, 65.0, single=8.1, bf16=False),
}
NAMES = (  # as nvidia-smi writes them, the more exact first; memory tells the rest apart
    ("H200", Gpu.h200),
    ("H100 PCIe", Gpu.h100_pcie),
    ("H100", Gpu.h100),
    ("A100", Gpu.a100_80g),
    ("L40S", Gpu.l40s),
    ("L4", Gpu.l4),
    ("A10G", Gpu.a10g),
    ("RTX 4090", Gpu.rtx_4090),
    ("RTX 3090", Gpu.rtx_3090),
    ("V100", Gpu.v100_32g),
    ("T4", Gpu.t4),
)
# of another speed than those they are named after
OTHERS = re.compile(r"\b(NVL|Laptop|Ti|D)\b|V100-PCIE")
SMALLER = {Gpu.a100_80g: Gpu.a100_40g, Gpu.v100_32g: Gpu.v100_16g}


def seen(line: str) -> tuple[str, Card] | None:
    """Return the GPU that a line ``name, driver, memory`` of nvidia-smi shows, or None if it is no such
    line.

    Its memory is what the line says. One that is not in the table has no speed: unknown.
    """
    cells = [cell.strip() for cell in line.split(",")]
    size = re.fullmatch(r"(\d+) MiB", cells[-1])
    if len(cells) < 3 or size is None:
        return None
    memory = int(size[1]) / 1024
    if OTHERS.search(cells[0]):
        return cells[0], Card(memory, bf16="V100" not in cells[0])
    for name, gpu in NAMES:
        if re.search(rf"\b{name}\b", cells[0]):
            smaller = SMALLER.get(gpu)
            if smaller is not None and memory < 0.75 * CARDS[gpu].memory:
                gpu = smaller
            return str(gpu), replace(CARDS[gpu], memory=memory)
    return cells[0], Card(memory)
