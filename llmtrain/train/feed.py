"""What does a run's config read from prepared data: batches of each rank, and sets to validate on."""

from llmtrain.config import Config
from llmtrain.data.batches import TrainBatches, ValidationSet
from llmtrain.data.dataset import PreparedData, open_unchecked
from llmtrain.data.order import START, Consumed, Order
from llmtrain.distributed import World, node_name
from llmtrain.errors import ConfigError, DataError


def check_data(config: Config, data: PreparedData) -> None:
    """Raise where the data does not fit the model."""
    data.manifest.require_fits(config.model.vocab_size)
    data.num_samples(config.batch.seq_len)


def check_together(data: PreparedData, world: World) -> int:
    """Compare the token files with the manifest before any is read. Collective. Returns how many this rank looked at.

    Ranks that see one folder share its files, so that all ranks together open each once; a copy on the disk of a node
    is shared by that node's. Raises DataError, the same on every rank.
    """
    identity = data.identity()
    alike = [rank for rank, other in enumerate(world.gather_text(identity)) if other == identity]
    looked, problem = 0, ""
    try:
        looked = data.check(alike.index(world.rank), len(alike))
    except DataError as error:
        problem = str(error) if len(alike) == world.size else f"on {node_name()}: {error}"
    problem = next((text for text in world.gather_text(problem) if text), "")
    if problem:
        raise DataError(problem)
    return looked


def train_batches(config: Config, world: World, data: PreparedData, since: Consumed = START) -> TrainBatches:
    """This rank's share of every update after `since`."""
    return TrainBatches(
        data,
        Order(data.num_samples(config.batch.seq_len), config.run.seed, data.manifest.content_hash),
        sequences=config.batch.sequences,
        micro=config.batch.micro,
        seq_len=config.batch.seq_len,
        rank=world.rank,
        world_size=world.size,
        since=since,
        document_mask=config.data.document_mask,
        pin=world.device.type == "cuda",
    )


def validation_sets(config: Config, data: PreparedData) -> list[ValidationSet]:
    """The data's own held-out split, under `validation`, and the sets the config names."""
    sets = [_validation_set(config, "validation", data)]
    for name, path in config.validation.sets.items():
        if name == "validation":
            raise ConfigError('validation.sets: the name "validation" is taken by the data\'s own split')
        other = open_unchecked(path, f"llmtrain prepare --config ... --set data.path={path}")
        if other.manifest.tokenizer_hash != data.manifest.tokenizer_hash:
            raise DataError(f"validation.sets.{name}: {path} was prepared with another tokenizer than {data.path}")
        sets.append(_validation_set(config, name, other))
    return sets


def _validation_set(config: Config, name: str, data: PreparedData) -> ValidationSet:
    return ValidationSet(
        name,
        data.validation,
        data.token_bytes,
        seq_len=config.batch.seq_len,
        max_tokens=config.validation.max_tokens,
        eos_id=data.manifest.eos_id,
        document_mask=config.data.document_mask,
        set_hash=data.manifest.validation_hash,
    )
