"""Which module's kernel gives other bits for the same inputs?

Where a machine does not compute the same twice, processes of this kind make the first micro-batch's forward and
backward pass from the run's first weights several times over, and write down a digest of what every module put out, of
the gradients that reached and left it, and of those of its parameters, in the order of computation. The first digest
that differs names the module: what went into it was the same. A gradient that differs where it reaches a module was
made by the module around that one.

The passes are those of the config on one device: its precision, kernels, recomputation and compilation, without an
optimizer, so that a model that is trained in shards may fit. Several processes make them, since some choices, of the
compiler for one, are made once a process:

    python -m llmtrain.train.verify_probe CONFIG OUT
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.data.batches import Batch
from llmtrain.data.dataset import open_unchecked
from llmtrain.distributed import World, open_world
from llmtrain.engines import numerics
from llmtrain.engines.base import WEIGHT, Slice, fill, prepare_blocks
from llmtrain.engines.fp8 import use_fp8
from llmtrain.errors import LlmtrainError
from llmtrain.model.decoder import Decoder, Embedding
from llmtrain.model.projection import Linear, sums_in_products
from llmtrain.train.feed import train_batches
from llmtrain.train.start import first_weights

PROCESSES, REPETITIONS = 2, 3
PASSES_FILE = "passes.jsonl"
FORWARD, BACKWARD = "forward pass", "backward pass"
RECOMPUTED = "backward pass, where its forward pass is computed again"


class Probed(NamedTuple):
    """The first module, in the order of computation, whose bits differ, and where; None where none does."""

    module: str | None
    where: str | None  # FORWARD, BACKWARD or RECOMPUTED
    said: str  # for a person


class Digests:
    """What goes through a model's modules, pass by pass. In compiled blocks there are no modules to listen to."""

    def __init__(self, model: Decoder, compiled: bool) -> None:
        self.compiled = compiled
        self.backward = False
        self.seen: dict[tuple[str, str, str], str] = {}  # by module, pass and tensor, in the order of computation
        for name, module in model.named_modules():
            if self.named(name) == name and name not in ("", "blocks"):
                self._listen(name, module)
        paths: dict[Tensor, list[str]] = {}  # two where the head is tied to the embedding
        for path, parameter in model.named_parameters(remove_duplicate=False):
            paths.setdefault(parameter, []).append(path)
        for shared, names in paths.items():
            shared.register_post_accumulate_grad_hook(self._taking(names))  # type: ignore[no-untyped-call]

    def note(self, module: str, what: str, *tensors: Any) -> None:
        """Write down what `module` made in this pass."""
        where = (RECOMPUTED if what == "output" else BACKWARD) if self.backward else FORWARD
        hashed = xxhash.xxh3_64()
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                hashed.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        self.seen[module, where, what] = hashed.hexdigest()

    def _listen(self, name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda module, inputs, output: self.note(name, "output", output))
        if isinstance(module, Embedding):  # tokens have no gradient
            return
        around = self._around(name)
        reached, left = f"gradient that reaches {name}", "gradient that leaves it"
        module.register_full_backward_pre_hook(lambda module, gradients: self.note(around, reached, *gradients))
        module.register_full_backward_hook(lambda module, gradients, _: self.note(name, left, *gradients))

    def named(self, name: str) -> str:
        """The module that is named for what happens in `name`: in a compiled block the block."""
        return ".".join(name.split(".")[:2]) if self.compiled and name.startswith("blocks.") else name

    def _around(self, name: str) -> str:
        parent = name.rpartition(".")[0]
        return "the decoder" if parent in ("", "blocks") else parent

    def _taking(self, paths: Sequence[str]) -> Callable[[Tensor], None]:
        """A hook that notes the gradient of the parameter at `paths` and frees it."""
        owners = " and ".join(self.named(path.rpartition(".")[0]) for path in paths)

        def take(parameter: Tensor) -> None:
            self.note(owners, f"gradient of {paths[0]}", parameter.grad)
            parameter.grad = None

        return take


def probe(config: Config, world: World, out: Path) -> None:
    """Make the passes, REPETITIONS times, and write what each gave to PASSES_FILE."""
    numerics.set_numerics(config, world.device)
    data = open_unchecked(config.data.path, "llmtrain prepare")
    batch = train_batches(config, world, data).update(1)[0].to(world.device)
    model, sums = _built(config, world)
    digests = Digests(model, config.engine.compile)
    for _ in range(REPETITIONS):
        digests.seen, digests.backward = {}, False
        _pass(config, model, batch, digests)
        for name, total in reversed(sums.items()):  # the last was made first
            digests.note(digests.named(name), f"sum of gradients of {name}", total)
            total.zero_()
        with (out / PASSES_FILE).open("a") as file:
            file.write(json.dumps([[*key, digest] for key, digest in digests.seen.items()]) + "\n")


def first_difference(folders: Sequence[Path], alone: bool, compiled: bool) -> Probed:
    """Compare what the processes wrote in `folders`. `alone`: the run itself computes on one device."""
    processes = [[_read(line) for line in (one / PASSES_FILE).read_text().splitlines()] for one in folders]
    passes = [one for process in processes for one in process]
    how = "" if alone else ", with the same kernels on one device"
    for key in passes[0]:
        if len({one.get(key) for one in passes}) == 1:
            continue
        module, where, _ = key
        within = any(len({one.get(key) for one in process}) > 1 for process in processes)
        kind = " (compiled)" if compiled and module.startswith("blocks.") else ""
        often = "" if within else ", from one process to another"
        return Probed(module, where, f"the first module to differ is {module}{kind}, in the {where}{often}{how}")
    return Probed(
        None,
        None,
        f"all modules gave the same bits in {len(passes)} passes{how}: "
        f"it comes from {'' if alone else 'what is between devices, or from '}the optimizer",
    )


def _read(line: str) -> dict[tuple[str, str, str], str]:
    return {(module, where, what): digest for module, where, what, digest in json.loads(line)}


def _built(config: Config, world: World) -> tuple[Decoder, dict[str, Tensor]]:
    """The model as engines compute with it, its first weights, and the sums that products add gradients to."""
    device = world.device
    with torch.device("meta"):
        model = Decoder(config.model)
    use_fp8(model, config, device)
    model.to_empty(device=device)
    if config.engine.precision == "bf16" and not _autocasts(config):
        model.to(torch.bfloat16)
    named = {name: parameter.detach().view(-1) for name, parameter in model.named_parameters()}
    weights = [Slice(name, 0, flat.numel(), flat.numel(), {WEIGHT: flat}) for name, flat in named.items()]
    fill(weights, first_weights(config, world)[0])
    sums: dict[str, Tensor] = {}
    adds = config.engine.kind == "single" and config.engine.precision == "bf16" and config.batch.accumulation(1) > 1
    if adds and sums_in_products(device):
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                sums[name] = torch.zeros_like(module.weight, dtype=torch.float32, requires_grad=False)
                module.sum_gradients_into(sums[name])
    prepare_blocks(model, config, device)
    return model, sums


def _autocasts(config: Config) -> bool:
    """Whether weights stay fp32 under bf16: those of DeepSpeed's stage 0 do."""
    engine = config.engine
    return engine.precision == "bf16" and engine.kind == "deepspeed" and engine.zero_stage == 0


def _pass(config: Config, model: Decoder, batch: Batch, digests: Digests) -> None:
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=_autocasts(config)):
        loss = model(batch.tokens, batch.targets, batch.document_ids)
    digests.backward = True
    (loss / max(1, batch.num_valid)).backward()


def main(words: Sequence[str]) -> None:
    """Be one process of a probe. Ends the process with an exit code where the user made a mistake."""
    path, out = words
    try:
        config = load_config(path)
        with open_world(config.engine.timeout_s, collectives=False) as world, numerics.named():
            probe(config, world, Path(out))
    except LlmtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as a leg ends
