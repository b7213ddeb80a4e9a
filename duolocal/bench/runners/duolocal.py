"""duolocal through the path its users take: `Engine.prefill` and greedy `Engine.generate`."""

from collections.abc import Iterator, Sequence
from typing import Any

from duolocal.bench.runners.serve import serve_runner
from duolocal.cache import Snapshot
from duolocal.engine.engine import Engine
from duolocal.settings import Sampling


class DuoLocalRunner:
    """One Engine."""

    engine: Engine

    @property
    def position(self) -> int:
        return self.engine.position

    def load(self, *, path: str, **options: Any) -> dict[str, Any]:
        """Load with the options of `Engine.load`; no peer speculates, so we do not."""
        self.engine = Engine.load(path, speculate="off", **options)
        plan = self.engine.plan
        return {
            "kv": self.engine.kv,
            **plan.report(),
            "chunk_size": self.engine.chunk_size,
            "notes": self.engine.notes,
        }

    def prefill(self, token_ids: Sequence[int]) -> None:
        self.engine.prefill(token_ids)

    def greedy(self, token_id: int, num_tokens: int) -> Iterator[int]:
        sampling = Sampling(temperature=0, max_tokens=num_tokens)
        return self.engine.generate([token_id], sampling, eos_ids=frozenset())

    def mark(self) -> Snapshot:
        return self.engine.snapshot()

    def rewind(self, mark: Snapshot) -> None:
        self.engine.restore(mark)


if __name__ == "__main__":
    serve_runner(DuoLocalRunner())
