"""The labels of an SAE's features: several features at a time, each with its scores."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from sae_core.labelling.asking import Asker, NoAnswer
from sae_core.labelling.chat import Refused
from sae_core.labelling.config import LabellerConfig
from sae_core.labelling.labels import Label
from sae_core.labelling.ledger import CeilingReached
from sae_core.labelling.prompts import judgement_question, label_question
from sae_core.labelling.scores import (
    Sample,
    balanced_accuracy,
    batches,
    detection_samples,
    fuzzing_samples,
)
from sae_core.labelling.windows import Material


class Labeller:
    """Labels features and scores the labels."""

    def __init__(self, asker: Asker, config: LabellerConfig) -> None:
        self.asker, self.config = asker, config
        self.labels: dict[int, Label] = {}

    async def run(
        self, materials: Iterable[Material], at_once: int, done: Callable[[], object]
    ) -> list[Label]:
        """The labels of features, in their order.

        Args:
            at_once: features in work at a time.
            done: called after each.

        Raises:
            SAEError: the model answers nothing. What was answered is kept.
        """
        order: list[int] = []
        todo = self._noted(materials, order)

        async def work() -> None:
            for material in todo:
                self.labels[material.feature] = await self.label(material)
                done()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        finally:
            await self.asker.chat.close()
        return [self.labels[feature] for feature in order]

    @staticmethod
    def _noted(materials: Iterable[Material], order: list[int]) -> Iterator[Material]:
        for material in materials:
            order.append(material.feature)
            yield material

    async def label(self, material: Material) -> Label:
        """The label of one feature, with its scores."""
        feature = material.feature
        try:
            found = await self._labelled(material)
        except CeilingReached:
            return Label(feature, status="not asked")
        except Refused:
            return Label(feature, status="refused")
        except NoAnswer:
            return Label(feature, status="no answer")
        if found.status == "ok" and self.config.score_labels:
            with suppress(CeilingReached):
                found = await self.scored(found, material)
        return found

    async def _labelled(self, material: Material) -> Label:
        question = label_question(self.config.labeller or "", material)
        answer = await self.asker.ask(question, material.feature)
        if answer is None:
            return Label(material.feature, status="invalid answer")
        return Label.of(material.feature, answer)

    async def scored(self, label: Label, material: Material) -> Label:
        """A label with its scores."""
        seed = self.config.label_seed
        return label._replace(
            detection=await self._score(label, "detection", detection_samples(material, seed)),
            fuzzing=await self._score(label, "fuzzing", fuzzing_samples(material, seed)),
        )

    async def _score(self, label: Label, name: str, samples: list[Sample]) -> float | None:
        """The balanced accuracy over the samples that were judged."""
        truth: list[bool] = []
        judged: list[bool] = []
        if len({sample.is_active for sample in samples}) < 2:
            return None
        for batch in batches(samples, self.config.scored_at_once):
            texts = [sample.text for sample in batch]
            question = judgement_question(self.config.scorer, name, label.described, texts)
            try:
                answer = await self.asker.ask(question, label.feature)
            except (Refused, NoAnswer):
                continue
            if answer is not None:
                truth += [sample.is_active for sample in batch]
                judged += answer["active"]
        return balanced_accuracy(truth, judged)
