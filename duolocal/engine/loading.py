"""What a resolved load needs the weights for: loading them, and the decisions that only they can make."""

from dataclasses import replace

from duolocal.cache import SelectionPolicy
from duolocal.engine.events import LoadEvents
from duolocal.engine.head_choice import rank_on_first_use
from duolocal.engine.kernels import arrangement, make_kernels, undecoded_note
from duolocal.engine.known_model import OpenedModel
from duolocal.engine.kv_choice import choose_kv
from duolocal.engine.resolve import Resolved, resolve
from duolocal.engine.select_choice import choose_channels
from duolocal.identify import LoadTransformer
from duolocal.models.loader import ModelSource
from duolocal.models.transformer import Transformer
from duolocal.quant.kv import KV_FORMATS
from duolocal.settings import LoadSettings


def load_weights(resolved: Resolved, events: LoadEvents) -> Transformer:
    """Build the kernels and load the weights for them; the caller has checked that there is room."""
    assert resolved.model.source is not None
    device, dtype = resolved.device, resolved.dtype
    kernels = make_kernels(
        resolved.kernels,
        device=device,
        dtype=dtype,
        num_threads=resolved.settings.threads,
        activations=resolved.activations,
        on_build=events.compiling,
    )
    weights = resolved.model.source.load(
        device=device, dtype=dtype, arrange=arrangement(kernels, dtype), on_layer=events.loading
    )
    return Transformer(resolved.config, weights, context=resolved.context, device=device, dtype=dtype, kernels=kernels)


def loader_for_ranking(source: ModelSource, settings: LoadSettings, events: LoadEvents) -> LoadTransformer:
    """Return what `identify` loads a model with: the settings' device and kernels, nothing cached yet."""

    def load(context: int, *, reference: bool) -> Transformer:
        kernels = "torch" if reference else settings.kernels
        asked = replace(settings, context=context, kernels=kernels, heads="all", kv=KV_FORMATS[0])
        return load_weights(resolve(asked, OpenedModel(source)), events)

    return load


def decide(resolved: Resolved, transformer: Transformer, events: LoadEvents) -> Resolved:
    """Return `resolved` with nothing undecided: heads that nobody has ranked are ranked, the KV format is measured."""
    source = resolved.model.source
    assert source is not None
    if resolved.heads.unranked:
        heads = rank_on_first_use(
            resolved.heads,
            source,
            transformer,
            sink_size=resolved.settings.sink_size,
            recent_size=resolved.settings.recent_size,
            published=resolved.model.published,
            on_progress=events.identifying,
        )
        resolved = replace(resolved, heads=heads)
    if resolved.unmeasured:
        kv, note = choose_kv(source, transformer, chunk_size=resolved.chunk_size, on_progress=events.measuring)
        resolved = replace(resolved, kv=kv, kv_note=note, unmeasured=False)
    return resolved


def selection_policy(resolved: Resolved, transformer: Transformer, events: LoadEvents) -> SelectionPolicy | None:
    """Return how decode selects blocks, finding the channels that this takes where they are not remembered."""
    if resolved.select is None:
        return None
    channels = choose_channels(resolved.model.source, transformer, resolved.heads.plan, on_progress=events.learning)
    return SelectionPolicy(resolved.select, channels)


def load_notes(resolved: Resolved, transformer: Transformer) -> list[str]:
    """Say for people what was decided, and what of the loaded weights is slow."""
    slow = undecoded_note(transformer.kernels, transformer.weights)
    return [*resolved.notes, *([slow] if slow else [])]
