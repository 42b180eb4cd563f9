"""What is run on a GPU, in order of worth, and what of it stands for it in a smoke run on a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One module of ``benchmarks`` with its arguments.

    Attributes:
        name: What its results are called.
        module: It has a ``main`` that takes arguments, ``--json`` among them.
        arguments: On a GPU.
        smoke: On a CPU.
        needs: A package without which it is left out.
    """

    name: str
    module: str
    arguments: str
    smoke: str
    needs: str | None = None


@dataclass(frozen=True)
class Part:
    """Tasks that one process runs one after the other.

    Attributes:
        title: A heading.
        share: Of the whole time, the most that it may take.
        tasks: In order of worth.
    """

    title: str
    share: float
    tasks: tuple[Task, ...]


_BF16 = "--device cuda --dtype bfloat16"
_STEP = f"{_BF16} --turns 10 --targets all"
_TINY_STEP = "--shape tiny --tokens 8 --turns 2 --targets all"

PARTS = {
    "a": Part("Tests", 0.3, (Task("tests", "benchmarks.gpu.checks", "--device cuda", "--device cpu"),)),
    "b": Part(
        "A training step over the frozen floor, and its memory",
        0.4,
        (
            Task("step 1B", "benchmarks.step", f"--shape 1B --tokens 4096 {_STEP}", _TINY_STEP),
            Task(
                "step 8B",
                "benchmarks.step",
                f"--shape 8B --tokens 2048 --without-full {_STEP}",
                f"{_TINY_STEP} --without-full",
            ),
            Task(
                "memory 1B",
                "benchmarks.memory",
                f"--shape 1B --tokens 4096 --targets all {_BF16}",
                "--shape tiny --tokens 8 --targets all",
            ),
            Task(
                "step 1B, compiled",
                "benchmarks.step",
                f"--shape 1B --tokens 4096 --compile blocks --without-full {_STEP}",
                f"{_TINY_STEP} --compile blocks --without-full",
            ),
            Task(
                "step 8B, compiled",
                "benchmarks.step",
                f"--shape 8B --tokens 2048 --compile blocks --without-full {_STEP}",
                f"{_TINY_STEP} --compile blocks --without-full",
            ),
        ),
    ),
    "c": Part(
        "Merging",
        0.2,
        (
            Task(
                "merge 1B",
                "benchmarks.merge",
                "--shape 1B --turns 5 --device cuda --dtype bfloat16 float16",
                "--shape tiny --turns 2 --dtype bfloat16",
            ),
            Task("end of fit 1B", "benchmarks.end_of_fit", f"--shape 1B {_BF16}", "--shape tiny"),
        ),
    ),
    "d": Part(
        "Tokens a second of a whole run",
        0.2,
        (
            Task(
                "throughput 1B",
                "benchmarks.throughput",
                f"--shape 1B --rows 8 --length 1024 {_BF16}",
                "--shape tiny --rows 2 --length 16 --turns 2 --steps 2",
            ),
        ),
    ),
    "e": Part(
        "Quantized bases",
        0.2,
        (
            Task(
                "quantized 1B",
                "benchmarks.quantized",
                "--shape 1B --tokens 2048 --turns 5 --kinds nf4-dq int8 --device cuda",
                "--shape tiny --tokens 8 --turns 2 --kinds nf4-dq",
                needs="bitsandbytes",
            ),
        ),
    ),
    "f": Part(
        "Memory beside its prediction",
        0.2,
        (
            Task(
                "held 8B",
                "benchmarks.held",
                f"--shape 8B --tokens 2048 {_BF16}",
                "--shape tiny --tokens 8 --device cpu",
            ),
            Task(
                "memory 8B",
                "benchmarks.memory",
                f"--shape 8B --tokens 2048 --targets all --without-full {_BF16}",
                "--shape tiny --tokens 8 --targets all --without-full",
            ),
        ),
    ),
}
