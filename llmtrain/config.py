"""What is a run? One validated description, in the order a reader asks: what, which model, which data, how fed,
how optimised, on what schedule, on which engine, how judged, how kept, how watched.

Conventions: a field the user did not write has the default shown here; an unknown key is an error; nothing is repaired
silently. Lengths carry their unit (`llmtrain.units`). The global batch is what the user states, accumulation is
derived. Reading files, `--set` overrides and error messages live in `llmtrain.config_file`.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from llmtrain.errors import ConfigError, did_you_mean
from llmtrain.presets import PRESETS
from llmtrain.units import Length, parse_batch_tokens

Fraction01 = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """One block of the config: strict types, no unknown keys, never changed after it was read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunConfig(Section):
    """What the run is called, where it lives, and when it ends early."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, dot, dash, underscore")
    dir: str = Field("", description="run folder; runs/<name> when empty")
    seed: int = Field(1234, ge=0, description="of the initial weights and of the data order")
    stop_at: Length | None = Field(None, description="end here without bending the curve")
    max_minutes: PositiveFloat | None = Field(None, description="wall-clock budget: save and stop when it is used up")
    branch_from: str | None = Field(None, description="start from a checkpoint of another run: runs/trunk@1000")
    init_from: str | None = Field(None, description="start from the weights in a folder that llmtrain import wrote")

    @model_validator(mode="before")
    @classmethod
    def _default_dir(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("dir") and isinstance(values.get("name"), str):
            return {**values, "dir": f"runs/{values['name']}"}
        return values

    @model_validator(mode="after")
    def _branch_names_an_update(self) -> Self:
        if self.branch_from is not None and not re.fullmatch(r".+@[0-9]+", self.branch_from):
            raise ValueError(f'branch_from "{self.branch_from}": write RUN_FOLDER@UPDATE, for example runs/trunk@1000')
        return self

    @property
    def parent(self) -> tuple[str, int] | None:
        """The run folder and update that `branch_from` names."""
        if self.branch_from is None:
            return None
        folder, _, update = self.branch_from.rpartition("@")
        return folder, int(update)


class RopeScaling(Section):
    """Llama-3 frequency scaling, for contexts longer than the ones trained on (Grattafiori 2024, arXiv:2407.21783)."""

    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_seq_len: PositiveInt = 8192


class ModelConfig(Section):
    """The decoder's shape. `preset` fills in what is not written beside it."""

    preset: str | None = Field(None, description=f"one of {', '.join(PRESETS)}")
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt = Field(description="num_heads for multi-head, fewer for grouped-query attention")
    ffn_size: PositiveInt
    vocab_size: PositiveInt
    max_seq_len: PositiveInt
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset")
        if isinstance(name, str):
            if name not in PRESETS:
                raise ValueError(f'unknown preset "{name}"{did_you_mean(name, PRESETS)}')
            values = {**PRESETS[name], **values}
        elif "num_heads" in values:
            values = {"num_kv_heads": values["num_heads"], **values}
        return values

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % self.num_heads or self.head_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


class HfSource(Section):
    """Any data set of the Hugging Face hub, streamed."""

    kind: Literal["hf"]
    name: str
    subset: str | None = None
    split: str = "train"
    text: str = Field("text", description="the column that holds a document")
    revision: str | None = Field(None, description="commit or tag of the data set, for a set that may change")


class FileSource(Section):
    """Local files: `text` (one document a file), `jsonl` or `parquet` (one document a row)."""

    kind: Literal["text", "jsonl", "parquet"]
    paths: list[str] = Field(min_length=1, description="files, folders (searched in name order) or globs")
    text: str = Field("text", description="the column that holds a document (jsonl, parquet)")


class StdlibSource(Section):
    """The source code of the Python standard library on this machine: real text with no download."""

    kind: Literal["stdlib"]


Source = Annotated[HfSource | FileSource | StdlibSource, Field(discriminator="kind")]


class TrainedTokenizer(Section):
    """A SentencePiece BPE model trained on a sample of the source, with byte fallback."""

    kind: Literal["sentencepiece"]
    vocab_size: int = Field(32000, ge=300, description="pieces, the 256 bytes and 3 control tokens included")
    sample_bytes: PositiveInt = Field(200_000_000, description="text drawn for training it; 10 MB suffice for 32000")


class GivenTokenizer(Section):
    """A SentencePiece model that exists already."""

    kind: Literal["model"]
    path: str


Tokenizer = Annotated[TrainedTokenizer | GivenTokenizer, Field(discriminator="kind")]


class DataConfig(Section):
    """Where the tokens lie, and what `llmtrain prepare` makes them from."""

    path: str
    source: Source = StdlibSource(kind="stdlib")
    tokenizer: Tokenizer = TrainedTokenizer(kind="sentencepiece")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.0005, description="of documents, by their hash")
    shard_bytes: PositiveInt = Field(64_000_000, description="text in one shard, the unit of work and of restart")
    document_mask: bool = Field(False, description="attention does not cross documents packed into one sequence")


class BatchConfig(Section):
    """The global batch, as `global_tokens` or `global_sequences`, and the micro-batch one rank holds at once."""

    global_tokens: Annotated[int, BeforeValidator(parse_batch_tokens)] | None = Field(
        None, description="524288, 512K, 4M; K and M are powers of two here"
    )
    global_sequences: PositiveInt | None = None
    micro: PositiveInt = Field(1, description="sequences of one micro-batch on one rank")
    seq_len: PositiveInt

    @model_validator(mode="after")
    def _one_global_batch(self) -> Self:
        if (self.global_tokens is None) == (self.global_sequences is None):
            raise ValueError("write exactly one of global_tokens and global_sequences")
        if self.global_tokens and self.global_tokens % self.seq_len:
            below = self.global_tokens // self.seq_len * self.seq_len
            nearest = " or ".join(str(n) for n in (below, below + self.seq_len) if n)
            raise ValueError(
                f"global_tokens {self.global_tokens} is not a whole number of sequences of {self.seq_len}: "
                f"the nearest possible are {nearest}"
            )
        return self

    @property
    def sequences(self) -> int:
        """Sequences of one update, over all ranks and micro-batches."""
        if self.global_sequences is not None:
            return self.global_sequences
        assert self.global_tokens is not None
        return self.global_tokens // self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of one update."""
        return self.sequences * self.seq_len

    def accumulation(self, world_size: int) -> int:
        """Micro-batches a rank runs for one update. Raises ConfigError naming the nearest possible batches."""
        together = self.micro * world_size
        if self.sequences % together == 0:
            return self.sequences // together
        below = self.sequences // together * together
        batches = " or ".join(f"{n} sequences ({n * self.seq_len} tokens)" for n in (below, below + together) if n)
        micros = [m for m in range(1, self.micro + 1) if self.sequences % (m * world_size) == 0]
        instead = f", or batch.micro {micros[-1]}" if micros else ""
        raise ConfigError(
            f"batch: {self.sequences} sequences do not divide into micro-batches of {self.micro} on {world_size} "
            f"rank{'s' * (world_size > 1)}: the nearest possible global batch is {batches}{instead}"
        )


class ScheduleConfig(Section):
    """The learning rate of update k. Shape parameters stand beside these and are checked by the registry."""

    model_config = ConfigDict(extra="allow")

    name: str
    peak: PositiveFloat
    warmup: Length = Length(0, "steps")
    horizon: Length = Field(description="where the curve ends; run.stop_at ends the run, not the curve")
    floor: Fraction01 = Field(0.0, description="final multiplier of the peak")

    @property
    def shape(self) -> dict[str, Any]:
        """The parameters of this shape alone, as written."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.horizon.unit in ("percent", "auto"):
            raise ValueError(f'horizon "{self.horizon}" must be in steps or tokens')
        if self.horizon.value < 1:
            raise ValueError("horizon must be at least one update")
        if self.warmup.unit == self.horizon.unit and self.warmup.value > self.horizon.value:
            raise ValueError(f'warmup "{self.warmup}" is longer than horizon "{self.horizon}"')
        return self


class LrFactors(Section):
    """What multiplies the learning rate of the parameters that are not matrices of the blocks."""

    embed: PositiveFloat = 1.0
    head: PositiveFloat = 1.0
    norm: PositiveFloat = Field(1.0, description="all norms, the last one too")


class OptimConfig(Section):
    """The optimizer and its gradient clipping: AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), or, for the
    matrices of the blocks, Muon (Jordan 2024; scaled to AdamW's updates as in Liu 2025, arXiv:2502.16982) beside it.

    Update k shrinks a decayed weight by the factor 1 - lr(k) * weight_decay, where lr(k) = peak * f(k), or by
    1 - f(k) * weight_decay with independent decay: then a search for the peak leaves the decay alone (Wortsman 2023,
    arXiv:2309.14322). Under `weight_decay_schedule`, with multiplier g, `weight_decay` stands for weight_decay * g(k).
    """

    name: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw", description="adamw8bit: matrices' moments in 8 bits; muon: betas and eps are those of the rest's AdamW"
    )
    betas: Annotated[tuple[Fraction01, Fraction01], Field(strict=False)] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    decay_norms: bool = False
    decay_embeddings: bool = False
    clip: PositiveFloat | None = Field(1.0, description="largest global gradient norm; null: no clipping")
    lr_factors: LrFactors = LrFactors()
    independent_weight_decay: bool = Field(False, description="decay by f(k) * weight_decay, whatever the peak")
    weight_decay_schedule: ScheduleConfig | None = Field(
        None, description="written like schedule, its peak is weight_decay; null: constant"
    )

    @model_validator(mode="before")
    @classmethod
    def _decay_from_its_peak(cls, values: Any) -> Any:
        """Fill in what is not written: the schedule's peak."""
        written = values.get("weight_decay_schedule") if isinstance(values, dict) else None
        if not isinstance(written, dict):
            return values
        decay = values.get("weight_decay", cls.model_fields["weight_decay"].default)
        if decay == 0:
            raise ValueError("weight_decay_schedule schedules weight_decay, which is 0: leave it out")
        if written.get("peak", decay) != decay:
            raise ValueError(f"weight_decay_schedule.peak is weight_decay, {decay}: leave it out")
        return {**values, "weight_decay_schedule": {**written, "peak": decay}}


class OffloadConfig(Section):
    """What ZeRO keeps in host memory."""

    optimizer: bool = False
    parameters: bool = False


class EngineConfig(Section):
    """Who computes an update. Fields the chosen kind does not use are ignored, so `kind` alone switches engines."""

    kind: Literal["single", "fsdp", "deepspeed"] = "single"
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "bf16", description="of compute; masters, moments and reduction are fp32; tf32: fp32 but for products on a GPU"
    )
    deterministic: bool = Field(
        False, description="on a GPU: kernels that give the same bits each time, which exact resume needs; slower"
    )
    attention: Literal["auto", "cudnn", "flash", "flash3", "flash4", "flex", "efficient"] = Field(
        "auto", description="kernel on a GPU; auto: the fastest measured for the head size and sequence"
    )
    fp8: Literal["none", "tensorwise", "rowwise"] = Field(
        "none", description="single, fsdp, bf16: scales of the blocks' products in fp8, one an operand or one a row"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="deepspeed: what is sharded")
    offload: OffloadConfig = OffloadConfig()
    deepspeed: dict[str, Any] = Field({}, description="deepspeed: keys added to its generated JSON")
    shard_ranks: PositiveInt | Literal["node"] | None = Field(
        None, description="fsdp: ranks that share one copy (HSDP), or node: those of a node; null: all"
    )
    reshard_after_forward: bool | None = Field(
        None, description="fsdp: free gathered weights after each pass, not each update; null: where they exceed 1 GiB"
    )
    activation_checkpointing: Literal["none", "cheap", "all"] | PositiveInt = Field(
        "none", description="recomputed backward; cheap: all but products and attention; all: blocks; n: every n-th"
    )
    accumulation_sync: Literal["every", "last"] = Field(
        "every", description="fsdp: reduce gradients of every micro-batch, or only with the last, and keep them whole"
    )
    compile: bool = Field(False, description="torch.compile each block, and the loss between its products")
    activation_memory: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="with compile: share of a block's activations that is kept, the cheapest are computed again"
    )
    timeout_s: PositiveInt = Field(1800, description="longest time without progress, then the job is ended")
    death_s: int = Field(30, ge=10, description="within this a rank without a sign of life is reported, the job ended")
    meet_timeout_s: PositiveInt = Field(60, description="longest wait for all ranks to come, from the first on")
    start_timeout_s: PositiveInt = Field(1800, description="the same while starting: loading, compiling")

    @model_validator(mode="after")
    def _deepspeed_keys(self) -> Self:
        owned = {
            "scheduler": "the schedule is llmtrain's: use schedule",
            "optimizer": "use optim",
            "train_batch_size": "use batch.global_tokens",
            "train_micro_batch_size_per_gpu": "use batch.micro",
            "gradient_accumulation_steps": "it is derived from batch",
            "gradient_clipping": "use optim.clip",
            "bf16": "use engine.precision",
            "fp16": "fp16 is not offered; use engine.precision bf16",
        }
        for key in self.deepspeed:
            if key in owned:
                raise ValueError(f'deepspeed key "{key}" is refused: {owned[key]}')
        return self

    @model_validator(mode="after")
    def _activations(self) -> Self:
        if self.activation_memory < 1 and not self.compile:
            raise ValueError("activation_memory below 1 is the compiler's choice of what to keep: write compile: true")
        if self.activation_memory < 1 and self.activation_checkpointing != "none":
            raise ValueError("activation_memory chooses within blocks, activation_checkpointing whole ones: write one")
        return self


class ValidationConfig(Section):
    """When and on what the run is judged. The data's own validation split is always judged, under `validation`."""

    every: Length | None = Field(None, description="also at update 0 and at the end; null: only there")
    micro: PositiveInt | None = Field(None, description="sequences at once on one rank; batch.micro when null")
    max_tokens: PositiveInt | None = Field(None, description="the first so many tokens of each set; null: all")
    ema_window: Length | None = Field(None, description="also judge a moving average of the weights; null: none")
    sets: dict[str, str] = Field({}, description="further sets, name: prepared data folder with the same tokenizer")


class CheckpointConfig(Section):
    """When and where the run is saved, and which saves are kept."""

    dir: str = Field(
        "", description="a folder or any fsspec URL, for example s3://bucket/run; RUN/checkpoints when empty"
    )
    every: Length | None = Field(None, description="also at the end and when told to stop; null: only there")
    ephemeral: Length | None = Field(None, description="saves in between, kept while among the newest two")
    keep: int = Field(3, ge=2, description="newest checkpoints kept, besides ephemeral ones")
    keep_every: Length | None = Field(None, description="checkpoints at multiples of this are kept for ever")
    async_save: bool = Field(True, description="write while training goes on, from a copy in host memory")
    timeout_s: PositiveInt = Field(24 * 3600, description="longest wait for a save, uploads and retries included")


class WandbConfig(Section):
    """Weights & Biases, as a mirror of metrics.jsonl."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "llmtrain"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []


class LoggingConfig(Section):
    """What is shown while training. metrics.jsonl always has every update."""

    every: PositiveInt = Field(10, description="updates between printed lines where there is no terminal")
    wandb: WandbConfig = WandbConfig()


class Config(Section):
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.batch.seq_len > self.model.max_seq_len:
            raise ValueError(f"batch.seq_len {self.batch.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}")
        tokenizer = self.data.tokenizer
        if isinstance(tokenizer, TrainedTokenizer) and tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size {tokenizer.vocab_size} exceeds model.vocab_size {self.model.vocab_size}"
            )
        if self.batch.sequences % self.batch.micro:
            self.batch.accumulation(1)
        if self.optim.name == "muon" and self.engine.kind == "deepspeed":
            raise ValueError(
                'optim.name "muon" runs on engine.kind single and fsdp: it needs matrices, and deepspeed has only flat '
                "parts of them; write --set engine.kind=fsdp or --set optim.name=adamw"
            )
        if self.optim.name == "adamw8bit" and self.engine.kind == "deepspeed":
            raise ValueError(
                'optim.name "adamw8bit" runs on engine.kind single and fsdp: deepspeed has moments of its own, '
                "flat and in fp32; write --set engine.kind=fsdp or --set optim.name=adamw"
            )
        if self.model.tie_embeddings and self.optim.lr_factors.head != 1:
            raise ValueError("optim.lr_factors.head: the head is tied to the embedding; write optim.lr_factors.embed")
        warmup = self.schedule.warmup
        if warmup.unit != "auto" and warmup.updates(self.batch.tokens, self.total_updates) > self.total_updates:
            raise ValueError(
                f'schedule.warmup "{warmup}" is longer than schedule.horizon "{self.schedule.horizon}" '
                f"({self.total_updates} updates of {self.batch.tokens} tokens)"
            )
        for field, length in (
            ("validation.every", self.validation.every),
            ("validation.ema_window", self.validation.ema_window),
            ("checkpoint.every", self.checkpoint.every),
            ("checkpoint.ephemeral", self.checkpoint.ephemeral),
            ("checkpoint.keep_every", self.checkpoint.keep_every),
        ):
            if length is not None and (length.unit == "auto" or self.updates(length) < 1):
                raise ValueError(f'{field} "{length}" must be at least one update')
        if self.run.stop_at is not None and self.run.stop_at.unit == "auto":
            raise ValueError("run.stop_at must be in steps, tokens or percent")
        return self

    @model_validator(mode="after")
    def _fp8_fits(self) -> Self:
        if self.engine.fp8 == "none":
            return self
        if self.engine.kind == "deepspeed":
            raise ValueError(
                f'engine.fp8 "{self.engine.fp8}" runs on engine.kind single and fsdp: write --set engine.kind=fsdp or '
                "--set engine.fp8=none"
            )
        if self.engine.precision != "bf16":
            raise ValueError(f'engine.fp8 "{self.engine.fp8}" rounds products of bf16: write engine.precision: bf16')
        model = self.model
        for field, size in (
            ("model.hidden_size", model.hidden_size),
            ("model.ffn_size", model.ffn_size),
            ("the size of keys and values, model.num_kv_heads * head size,", model.num_kv_heads * model.head_size),
            ("the tokens of a micro-batch, batch.micro * batch.seq_len,", self.batch.micro * self.batch.seq_len),
        ):
            if size % 16:
                raise ValueError(
                    f"engine.fp8: fp8 products need sizes that 16 divides, but {field} is {size}; the nearest are "
                    f"{size // 16 * 16} and {size // 16 * 16 + 16}"
                )
        return self

    def updates(self, length: Length) -> int:
        """`length` in whole updates of this run."""
        return length.updates(self.batch.tokens, self.total_updates)

    @property
    def total_updates(self) -> int:
        """Updates until the schedule's horizon."""
        return self.schedule.horizon.updates(self.batch.tokens)

    @property
    def last_update(self) -> int:
        """The update the run ends with: `run.stop_at`, else the horizon."""
        return self.total_updates if self.run.stop_at is None else self.updates(self.run.stop_at)

    @property
    def checkpoint_url(self) -> str:
        """Where the run's checkpoints lie."""
        return self.checkpoint.dir or f"{self.run.dir}/checkpoints"


def content_hash(value: Any) -> str:
    """16 hex digits of the BLAKE2b hash of `value` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
