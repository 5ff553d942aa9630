"""One stream of activations for several SAEs, with nothing on disk.

Each SAE has a source of its own, with the windows, order and shuffle of a `StreamingSource` at its
hook. So it gets the batches that it would get alone, and can be taken up again at any step. Only
the reading is shared: what one source reads is kept at the hooks of all sources that are about to
read the same, until one of them reads something else. In memory there are the activations of about
`SHUFFLE_TOKENS` tokens per hook, and while one chunk follows another, for a short time twice as
many. In the end-to-end phase, whose windows all SAEs read as well, the pass through the model as it
is is shared in the same way; the spliced passes are each SAE's own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sae_core.activations.store import CALIBRATION_TOKENS, StepSize, StreamingSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.train_config import BatchSize

VALIDATION_TOKENS = 2 * CALIBRATION_TOKENS
"""Held-out activations that are read together, about: all that a threshold is calibrated on."""

Site = tuple[Hook, ...]
"""The hooks that an SAE reads: one, or with a transcoder's target two."""

Pass = tuple[Tensor, dict[Hook, Tensor]]
"""What `LanguageModel.hidden` gives."""


class Reading:
    """What is read together: windows of a part, in one forward pass after another.

    Args:
        part: `train` or `validation`.
        indices: (W,) the windows of each batch that the model is given apart.
        order: the tokens of a single batch that take part, (at most W * positions,), in an order;
            None leaves all as they are.
    """

    def __init__(
        self, part: str, epoch: int, indices: Sequence[Tensor], order: Tensor | None = None
    ) -> None:
        self.part, self.epoch, self.indices, self.order = part, epoch, indices, order

    def is_same(self, other: "Reading") -> bool:
        """Whether both are of the same windows. The order follows from them and the epoch."""
        return (self.part, self.epoch, len(self.indices)) == (
            other.part,
            other.epoch,
            len(other.indices),
        ) and all(map(torch.equal, self.indices, other.indices))


Result = TypeVar("Result")


class Once(Generic[Result]):
    """Runs windows through the model once for all SAEs that read the same.

    Args:
        run: of windows and the hooks that are wanted.
    """

    def __init__(self, run: Callable[[Tensor, Sequence[Hook]], Result]) -> None:
        self.run = run
        self._kept: dict[bytes, tuple[set[Hook], Result]] = {}
        self._asked: set[Hook] = set()
        self._asked_before: set[Hook] = set()

    def begin(self) -> None:
        """Other windows follow."""
        self._kept = {}
        self._asked_before, self._asked = self._asked, set()

    def __call__(self, tokens: Tensor, hooks: Sequence[Hook]) -> Result:
        """With the hooks that were asked for before the last `begin`, too."""
        key = tokens.cpu().numpy().tobytes()
        self._asked |= set(hooks)
        if key not in self._kept or not set(hooks) <= self._kept[key][0]:
            wanted = self._asked_before | set(hooks)
            self._kept[key] = wanted, self.run(tokens, sorted(wanted))
        return self._kept[key][1]


class SharedStream:
    """The passes of one model, for sources at several hooks.

    Args:
        batch_size: windows per forward pass.
    """

    def __init__(self, model: LanguageModel, windows: TokenWindows, batch_size: BatchSize) -> None:
        self.model, self.windows, self.batch_size = model, windows, batch_size
        self.microbatch = model.forward_microbatch(windows.length, batch_size)
        self._wanted: set[Site] = set()
        self._reading: Reading | None = None
        self._kept: dict[Site, list[Tensor]] = {}
        self._hidden, self._activations = Once(model.hidden), Once(model.activations)

    def expect(self, sources: Iterable["SharedSource"]) -> None:
        """Say which sources read the same next. The hooks of no others are read with them."""
        self._wanted = {source.site for source in sources}
        self._hidden.begin()
        self._activations.begin()

    def hidden(self, tokens: Tensor, hooks: Sequence[Hook]) -> Pass:
        """`LanguageModel.hidden`, once for all that read the same windows until the next `expect`:
        with the hooks that were asked for before the last one."""
        self._reading, self._kept = None, {}  # the phase needs the memory
        return self._hidden(tokens, hooks)

    def activations(self, tokens: Tensor, hooks: Sequence[Hook]) -> dict[Hook, Tensor]:
        """`LanguageModel.activations`, in the same way."""
        self._reading, self._kept = None, {}
        return self._activations(tokens, hooks)

    def rows(self, reading: Reading, site: Site) -> list[Tensor]:
        """(W * positions, D) the activations of each batch at the hooks of a site, which lie side
        by side."""
        if self._reading is None or not reading.is_same(self._reading):
            self._reading, self._kept = reading, {}
        if site not in self._kept:
            sites = {site} | (self._wanted - set(self._kept))
            self._kept |= self._read(reading, sorted(sites))
        return self._kept[site]

    def _read(self, reading: Reading, sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        found: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for indices in reading.indices:
            parts = self._parts(reading, indices, sites)
            for site in sites:  # one after the other, so that only one is there twice
                rows = torch.cat(parts.pop(site)).flatten(0, 1)
                found[site].append(rows if reading.order is None else rows[reading.order])
        return found

    def _parts(
        self, reading: Reading, indices: Tensor, sites: Sequence[Site]
    ) -> dict[Site, list[Tensor]]:
        """(some windows, positions, D) of each forward pass at each site."""
        is_train = reading.part == "train"
        windows = self.windows
        tokens = windows.train(reading.epoch, indices) if is_train else windows.validation(indices)
        hooks = list(dict.fromkeys(hook for site in sites for hook in site))

        def read(at: slice) -> dict[Site, Tensor]:
            found = self.model.activations(tokens[at], hooks)
            return {
                site: torch.cat([found[hook][:, 1:] for hook in site], dim=-1) for site in sites
            }

        parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for of_pass in self.microbatch.parts(len(tokens), read):
            for site, rows in of_pass.items():
                parts[site].append(rows)
        return parts


class SharedSource(StreamingSource):
    """The source of one of several SAEs that read one stream.

    Args:
        stream: what reads for all of them; they have equal `tokens_per_step` and `seed`.
        target: of a transcoder.
    """

    def __init__(
        self,
        stream: SharedStream,
        hook: Hook,
        *,
        tokens_per_step: StepSize,
        seed: int,
        target: Hook | None = None,
    ) -> None:
        super().__init__(
            stream.model,
            stream.windows,
            hook,
            batch_size=stream.batch_size,
            tokens_per_step=tokens_per_step,
            seed=seed,
            target=target,
        )
        self.stream, self.site = stream, tuple(self.hooks)

    def shuffled(self, epoch: int, order: Tensor, first: int = 0) -> Iterator[Tensor]:
        for windows, drawn in self.chunks(epoch, order, first):
            reading = Reading("train", self.pass_of(epoch), [windows], drawn)
            [rows] = self.stream.rows(reading, self.site)
            yield rows

    def validation_batches(self, stride: int = 1) -> Iterator[Tensor]:
        for together in self._together(self.validation_windows(stride)):
            of_windows = self.stream.rows(Reading("validation", 0, together), self.site)
            for indices, rows in zip(together, of_windows, strict=True):
                yield from self._validating(indices, rows)

    def _together(self, batches: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """The windows of batches, about `VALIDATION_TOKENS` tokens at a time."""
        group: list[Tensor] = []
        for indices in batches:
            group.append(indices)
            if sum(map(len, group)) * self.positions >= VALIDATION_TOKENS:
                yield group
                group = []
        if group:
            yield group
