"""Options that many commands share: which model, how it is cached, where and how it computes."""

import argparse

from duolocal.settings import DTYPES, LoadSettings, parse_bytes, parse_threads, parse_tokens

DEFAULT_MODEL = "smollm2-135m"  # as in the registry, which is not imported for --help
_MODEL_HELP = "a name from `duolocal models`, a hub id org/name, a .gguf file or a model folder (default: %(default)s)"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help=_MODEL_HELP)


def add_model_options(parser: argparse.ArgumentParser, *, context: bool = True) -> None:
    """Add what says which model is loaded, with which cache, and the options of the machine."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, help=_MODEL_HELP)
    if context:
        group.add_argument(
            "--context",
            metavar="SIZE",
            help="tokens of context: 8192, 32K, 1M (default: what the model was trained for, at most 32K)",
        )
    group.add_argument(
        "--kv",
        default="auto",
        metavar="FORMAT",
        help="KV cache of the retrieval heads: auto (measured for the model), 32, 16, int8, fp8, k8v4, int4",
    )
    group.add_argument(
        "--heads",
        default="auto",
        metavar="SPLIT",
        help="retrieval heads: auto, all, a ratio such as 0.5, published, or a pattern file or folder (default: auto)",
    )
    group.add_argument(
        "--weights",
        default="auto",
        metavar="FORMAT",
        help="auto (as in the file), or nf4 or int8: made of a 16-bit model while loading, by bitsandbytes",
    )
    group.add_argument(
        "--outer-weights",
        default="auto",
        metavar="FORMAT",
        help="lm_head and embedding: auto (as in the file), or int8 or int4, made while loading",
    )
    group.add_argument(
        "--kv-device-memory",
        metavar="SIZE",
        help="GPU memory, or without a GPU memory, for KV blocks, such as 4GiB; the others lie in host memory, or in a "
        "file (default: as many as fit)",
    )
    group.add_argument(
        "--select",
        default="off",
        metavar="BUDGET",
        help="answers read only the blocks that matter: auto (2,048 tokens per retrieval head, in contexts from 32K), "
        "a number of tokens, or off, which reads everything (default: off)",
    )
    group.add_argument(
        "--prefill",
        default="exact",
        metavar="HOW",
        help="how retrieval heads read a prompt: exact, or sparse: only the blocks that hold 98%% of their attention, "
        "by an estimate (default: exact)",
    )
    group.add_argument("--sink-size", metavar="N", help="first tokens that streaming heads keep")
    group.add_argument("--recent-size", metavar="N", help="last tokens that streaming heads keep")
    add_machine_options(group)


def add_machine_options(group: argparse._ActionsContainer) -> None:
    """Add where and with which kernels it computes."""
    group.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    group.add_argument("--threads", metavar="N", help="CPU threads (default: one per physical core)")
    group.add_argument(
        "--kernels", default="auto", help="CPU kernels: auto, compiled or torch, the slow reference (default: auto)"
    )


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Add chunk size, compute type and RoPE scaling."""
    group = parser.add_argument_group("computing")
    group.add_argument("--chunk-size", metavar="N", help="tokens per prefill step; changes memory, not results")
    group.add_argument(
        "--dtype", default="auto", help=f"compute type: {', '.join(DTYPES)} (default: auto)", metavar="TYPE"
    )
    group.add_argument("--rope", metavar="SCALING", help="override the model's RoPE scaling, for example yarn:4")


def chosen_settings(options: argparse.Namespace) -> LoadSettings:
    """Return what the options ask for; raises SettingsError for a size that is none."""

    def count(name: str) -> int | None:
        text = getattr(options, name, None)  # a benchmark has some of the options only
        option = "--" + name.replace("_", "-")
        if text is None:
            return None
        return 0 if text.strip() == "0" and name == "sink_size" else parse_tokens(text, option)

    memory = getattr(options, "kv_device_memory", None)
    return LoadSettings(
        model=options.model,
        context=count("context"),
        kv=options.kv,
        heads=options.heads,
        sink_size=count("sink_size"),
        recent_size=count("recent_size"),
        chunk_size=count("chunk_size"),
        device=options.device,
        dtype=getattr(options, "dtype", "auto"),
        rope=getattr(options, "rope", None),
        threads=chosen_threads(options),
        kernels=getattr(options, "kernels", "auto"),
        weights=getattr(options, "weights", "auto"),
        outer_weights=getattr(options, "outer_weights", "auto"),
        kv_device_memory=parse_bytes(memory, "--kv-device-memory") if memory else None,
        select=getattr(options, "select", "off"),
        prefill=getattr(options, "prefill", "exact"),
    )


def chosen_threads(options: argparse.Namespace) -> int | None:
    """Return --threads, None where it is not given; raises SettingsError."""
    return None if options.threads is None else parse_threads(options.threads)
