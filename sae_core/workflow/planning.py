"""The cost of a configuration's jobs, estimated only from model shapes and numbers of tokens.

A floating-point operation is a multiplication or an addition. With d the width of the activations,
D the number of features, k the active features per token and L the length of a window, per token:

* a block of the model: two per parameter of its matrices, and 4 L per dimension of all heads
  (attention is computed over the whole window); the logits: two per parameter;
* tokenize: none, but a tokenizer takes time;
* harvest: the blocks up to the last hooked one; without a store, the same in every epoch;
* a training step: 2 d D for the encoder product, and 8 k d for decoding and the gradients, which
  work on pairs of token and feature; more where the code is dense, that of the `standard` and
  `gated` kinds, and of `jumprelu` at the start (`plain_step.py`); with end-to-end losses the model
  once, the blocks after the hook once and back, which takes `BACKWARD` times as long, and the
  logits three times, and the same for the batch that balances the losses; every validation in
  their phase the model once and the blocks after the hook once, both with logits;
* the evaluation: the model and, `EVALUATED_PASSES` times, the blocks after the hook, each with
  logits; besides the model up to the hook;
* the analysis of features: the blocks up to the hook, and 2 d D for the encoder product.

A job takes, in seconds, `start_seconds` of the machine, `step_ms` for every training step, in which
a GPU waits for the program, its operations at the rates that the machine reaches in each of these,
what is done to every weight in every step, and to every logit, at its memory's rate, and its
reading and writing at the disk's. Trainings are counted to their last epoch; early stopping may end
them before. docs/benchmarks.md has what this is compared with.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sae_core.train_config import windows_per_pass
from sae_core.trainer.schedule import step_size
from sae_core.workflow import plain_step
from sae_core.workflow.costs import Cost, light
from sae_core.workflow.gpu_step import STATIC_KINDS, step_bytes
from sae_core.workflow.plan_tables import BYTES_PER_TOKEN, MODEL_BYTES, Machine, ModelShape
from sae_core.workflow.workflow_config import ModelPlan, Plan, RunPlan

OPTIMIZER_BYTES = 64
"""Memory traffic per parameter and step: weights, gradient and Adam's two moments read and written,
and the passes for clipping, projection and unit norm, in float32."""

BACKWARD = 5
"""What the gradient of a block's activations takes, as a multiple of the block."""

LOGIT_BYTES, KERNEL_BYTES = 80, 8
"""Memory traffic of a logit: itself, in float32, its log-softmax, and what is made of that; and in
training on a GPU, where both models' logits of a word take 16: see `sae/kl_kernel.py`."""

STATE_BYTES, COPIED_BYTES, HALF_BYTES = 16, 12, 2
"""Memory a parameter of an SAE in training: weights, gradient and two moments; on a CPU the copy of
these that is written; on a GPU the weights in bfloat16."""

SECOND_BYTES = 2
"""Of them, the decoder's second moment, which `active_adam` does not keep: the decoder has half of
the parameters."""

GRADIENT_BYTES = 4
"""Of them, the gradient: in a step of fixed sizes it is part of the step's memory."""

SHUFFLE_TOKENS = 2**18
"""As in `activations/store.py`, which needs torch."""

PROGRAM_GB = 0.5
"""Memory of Python with torch and transformers."""

EVALUATED_ROWS, TRAINED_ROWS, KERNEL_ROWS = 128, 256, 2048
"""Tokens whose logits are in memory at once: `LOGIT_ROWS` of `evaluation/metrics.py` and of
`losses.py`, and `KERNEL_ROWS` of the latter; both need torch."""

EVALUATED_PASSES = 4
"""Of the blocks after the hook in an evaluation: with the SAE, with all tokens given to it, and two
ablations. Where tokens other than a window's first are attention sinks there are up to two more."""

TOKENISED_PER_SECOND, TOKENISING_GB = 1.2e6, 0.9
"""Tokens of two processes that tokenise, see docs/benchmarks.md, and their memory where texts have
a million characters."""

TOKEN_BYTES = 4
"""A token in its file, in which the texts are as well."""

SCORE_BYTES = 16
"""Memory of a query and a key in attention: score, probability and their gradients, in float32."""

LOGIT_COPIES, LOGIT_GRADIENTS = 5, 7
"""How many times they are, in float32: both models' logits and probabilities; with gradients."""


class Work(NamedTuple):
    """The training of an SAE."""

    tokens: float
    steps: float
    model_flops: float
    """Of the end-to-end phase."""
    sae_flops: float
    pair_flops: float
    traffic: float
    """Bytes of memory."""
    disk: float
    model_memory: float
    """Bytes that the end-to-end phase needs; 0 without one."""
    sae_memory: float
    step_memory: float
    """Bytes besides, that a step needs while it runs."""

    def done(self) -> dict[str, float]:
        """All but the memory."""
        found = self._asdict()
        return {name: found[name] for name in found if not name.endswith("_memory")}


def tokenising(machine: Machine, tokens: float) -> Cost:
    """The token files that all models with one tokenizer share. The texts are read twice: first to
    identify them."""
    texts, disk = tokens * BYTES_PER_TOKEN, tokens * (BYTES_PER_TOKEN + TOKEN_BYTES)
    seconds = machine.start_seconds + tokens / TOKENISED_PER_SECOND
    seconds += (2 * texts + disk) / machine.disk_gb_s / 1e9
    return Cost("tokenize", "per tokenizer", tokens, 0, disk, TOKENISING_GB * 1e9, seconds)


class Planner:
    """The costs of one model's jobs on a machine.

    Args:
        tokens: of the corpus, in the model's tokens.
    """

    def __init__(
        self, plan: Plan, model: ModelPlan, shape: ModelShape, machine: Machine, tokens: float
    ) -> None:
        self.plan, self.model, self.shape, self.machine = plan, model, shape, machine
        data = model.data
        self.length = data.max_text_length
        self.n_train = int(tokens * (1 - data.val_fraction)) // self.length
        held_out = int(tokens * data.val_fraction) // self.length
        self.n_validation = held_out - held_out // 2
        self.n_windows = self.n_train + held_out
        self.n_pass_tokens = self.length * windows_per_pass(self.length, model.runtime.batch_size)
        self.n_evaluation = min(held_out // 2, plan.evaluation.max_windows)
        self.model_bytes = MODEL_BYTES * shape.parameters
        self.loaded_bytes = self._weight_bytes() * shape.parameters
        self.loading_bytes = self._loading(shape.parameters)
        self.sites = 2 if model.hook.target_hook_name else 1
        """Activations stored per token and layer: a transcoder's target is one more."""

    def _state_bytes(self) -> int:
        left_out = SECOND_BYTES if self.plan.training.optimizer == "active_adam" else 0
        copied = COPIED_BYTES - left_out if self.machine.is_cpu else HALF_BYTES
        return STATE_BYTES - left_out + copied

    def _weight_bytes(self) -> int:
        """A parameter of the loaded model. `auto` is float32 on a CPU that is slow at bfloat16."""
        dtype = self.model.model.model_dtype
        in_full = dtype == "float32" or dtype == "auto" and self.machine.is_cpu
        return 4 if in_full else 2

    def _loading(self, parameters: float) -> float:
        """Memory while so many parameters are loaded: a CPU that converts them has their files in
        memory, too."""
        loaded = self._weight_bytes() * parameters
        is_converted = self._weight_bytes() > MODEL_BYTES and self.machine.is_cpu
        return loaded + (MODEL_BYTES * parameters if is_converted else 0)

    def _logits(self, rows: int, copies: int) -> float:
        """Memory of the logits of so many tokens."""
        return copies * 4 * rows * self.shape.vocab_size

    def _trained_logits(self) -> float:
        """Memory of the logits in training: on a GPU those of both models."""
        if self.machine.is_cpu:
            return self._logits(TRAINED_ROWS, LOGIT_GRADIENTS)
        return 2 * self._weight_bytes() * KERNEL_ROWS * self.shape.vocab_size

    def _graph(self, tokens: int, blocks: int) -> float:
        """Memory of what a backward pass through some blocks needs of the forward one, for a window
        of so many tokens: per block six vectors of the model's width and three of its MLP's. On a
        GPU also what one block's attention is computed anew with."""
        numbers = tokens * blocks * (6 * self.shape.d_model + 3 * self.shape.d_mlp)
        scores = 0 if self.machine.is_cpu or not blocks else tokens**2 * self.shape.n_heads
        return self._weight_bytes() * numbers + SCORE_BYTES * scores

    def costs(self) -> Iterator[Cost]:
        """The jobs, in the order in which they can run."""
        yield self._cost("fetch", self.model.model_id, disk=self.model_bytes, read=self.model_bytes)
        is_stored, runs = self.plan.harvest.store, list(self.model.runs(self.shape.n_layers))
        yield from self.harvests() if is_stored else self.streams()
        for run in runs:
            yield self.training(run) if is_stored else light("train", run.name)
            yield from (self.evaluation(run), self.features(run))
            yield from (light("browse", run.name), light("plot", run.name))

    def ways(self) -> "tuple[list[Cost], list[Cost]]":
        """What makes the SAEs with stored activations, and without."""
        trainings = [self.training(run) for run in self.model.runs(self.shape.n_layers)]
        return [*self.harvests(), *trainings], list(self.streams())

    def harvests(self) -> Iterator[Cost]:
        """One pass over all layers, in `harvest_jobs` parts."""
        jobs = self.plan.harvest.harvest_jobs
        layers = [self.model.resolve(label, self.shape.n_layers) for label in self.model.layers]
        windows = (self.plan.harvest.passes * self.n_train + self.n_validation) / jobs
        tokens = windows * self.length
        stored = (
            windows
            * (self.length - 1)
            * self.shape.d_model
            * MODEL_BYTES
            * self.sites
            * len(layers)
        )
        batch = self.n_pass_tokens * self.shape.d_model
        for shard in range(jobs):
            yield self._cost(
                "harvest",
                f"{self.model.model_id} {shard + 1}/{jobs}",
                tokens=tokens,
                model_flops=tokens * self.shape.flops(max(layers) + 1, self.length),
                disk=stored,
                read=self.model_bytes + stored,
                memory=self._loading(self.shape.up_to(max(layers)))
                + batch * (4 * len(layers) + 16),
            )

    def training(self, run: RunPlan) -> Cost:
        """All epochs of an SAE on stored activations."""
        work, d, positions = self._work(run), self.shape.d_model, self.length - 1
        read = self.plan.training.num_epochs * (self.n_train + self.n_validation) * positions * d
        model_read = self.model_bytes if work.model_flops else 0
        # The model is loaded when activations are no longer shuffled.
        in_steps = 3 * self._shuffled() + work.step_memory
        # A dense code is there during the model's passes; those of other kinds are sparse by then.
        in_phase = work.model_memory + (0 if run.sae.k else work.step_memory)
        memory = max(in_phase, in_steps) + work.sae_memory
        return self._cost(
            "train",
            run.name,
            **work.done(),
            read=read * MODEL_BYTES * self.sites + model_read,
            memory=memory,
        )

    def streams(self) -> Iterator[Cost]:
        """Jobs that run the model and train the SAEs of some layers, with nothing stored."""
        runs = list(self.model.runs(self.shape.n_layers))
        layers = list(dict.fromkeys(run.layer for run in runs))
        most = self.plan.harvest.layers_per_job or len(layers)
        for first in range(0, len(layers), most):
            some = layers[first : first + most]
            yield self._stream(some, [run for run in runs if run.layer in some])

    def _stream(self, layers: Sequence[int], runs: Sequence[RunPlan]) -> Cost:
        works = [self._work(run) for run in runs]
        tokens = self.plan.training.num_epochs * (self.n_train + self.n_validation) * self.length
        totals = {name: sum(work.done()[name] for work in works) for name in works[0].done()} | {
            "tokens": tokens
        }
        totals["model_flops"] += tokens * self.shape.flops(max(layers) + 1, self.length)
        in_phase = max(work.model_memory for work in works)
        model = self._loading(self.shape.up_to(max(layers))) if not in_phase else in_phase
        batch = self.n_pass_tokens * self.shape.d_model * (4 * len(layers) + 16)
        a_step = max(work.step_memory for work in works)  # one graph runs at a time
        # A chunk of each layer while the one before it is still in use, and one in its old order.
        shuffled = (2 * len(layers) + 1) * self._shuffled() * self.sites
        return self._cost(
            "stream",
            f"{self.model.model_id} {'+'.join(map(str, layers))}",
            **totals,
            read=self.model_bytes,
            memory=model + batch + shuffled + sum(work.sae_memory for work in works) + a_step,
        )

    def _shuffled(self) -> float:
        """Bytes of the activations at a hook that are shuffled together."""
        tokens = min(SHUFFLE_TOKENS, self.n_train * (self.length - 1))
        return tokens * self.shape.d_model * MODEL_BYTES

    def _work(self, run: RunPlan) -> "Work":
        """All epochs of an SAE, but where its activations come from."""
        training, e2e, positions = self.plan.training, self.plan.end_to_end, self.length - 1
        n_rows = self.n_train * positions
        per_step = min(step_size(training, n_rows), n_rows)
        steps = training.num_epochs * (n_rows // per_step)
        validated = self.n_validation * positions
        d, width = self.shape.d_model, run.sae.n_features(self.shape.d_model)
        as_matrix = not self._is_exact()
        model_flops, memory, n_logits = 0.0, 0.0, 0.0
        if e2e.use_end_to_end:
            behind = self.shape.n_layers - run.layer - 1
            trained = (e2e.end_to_end_fraction * steps + 1) * per_step
            checked: float = math.ceil(e2e.end_to_end_fraction * training.num_epochs) * validated
            n_layers, length = self.shape.n_layers, self.length
            if e2e.end_to_end_stride > 1:  # all windows up to the hook, and some further
                model_flops += (trained + checked) * self.shape.flops(run.layer + 1, length)
                trained, checked = (n / e2e.end_to_end_stride for n in (trained, checked))
            model_flops += trained * self.shape.flops(
                n_layers + (1 + BACKWARD) * behind, length, logits=3
            )
            model_flops += checked * self.shape.flops(n_layers + behind, length, logits=2)
            n_logits = 2 * (trained + checked) * self.shape.vocab_size
            memory = max(
                self.loading_bytes,
                self.loaded_bytes + self._trained_logits() + self._graph(length, behind),
            )
        parameters = 2 * d * width
        logit_bytes = LOGIT_BYTES if self.machine.is_cpu else KERNEL_BYTES
        return Work(
            tokens=steps * per_step,
            steps=steps,
            model_flops=model_flops,
            sae_flops=steps * per_step * plain_step.dense_flops(run.sae, d, as_matrix)
            + training.num_epochs * validated * 2 * d * width,
            pair_flops=steps * per_step * plain_step.pair_flops(run.sae, d, as_matrix),
            traffic=steps * parameters * OPTIMIZER_BYTES + n_logits * logit_bytes,
            disk=4 * parameters * 4,
            model_memory=memory,
            sae_memory=parameters * self._state_bytes(),
            step_memory=self._step_memory(run, per_step),
        )

    def _is_exact(self) -> bool:
        """Whether values are in float32."""
        return self.machine.is_cpu or self.plan.training.compute_dtype == "float32"

    def _step_memory(self, run: RunPlan, tokens: int) -> float:
        """Memory of a step besides that of its SAE's state."""
        d, sae, is_cpu = self.shape.d_model, run.sae, self.machine.is_cpu
        if is_cpu or sae.sae_type not in STATIC_KINDS:
            return plain_step.step_bytes(sae, d, tokens, self._is_exact(), is_cpu)
        gradient = GRADIENT_BYTES * 2 * d * sae.n_features(d)
        return max(0.0, step_bytes(sae, d, tokens, self._is_exact()) - gradient)

    def evaluation(self, run: RunPlan) -> Cost:
        """The held-out windows through the model and the SAE."""
        tokens = self.n_evaluation * self.length
        d, width = self.shape.d_model, run.sae.n_features(self.shape.d_model)
        behind = self.shape.n_layers - run.layer - 1
        blocks = (run.layer + 1) + self.shape.n_layers + EVALUATED_PASSES * behind
        n_logits = 1 + EVALUATED_PASSES
        batch = self.n_pass_tokens
        return self._cost(
            "evaluate",
            run.name,
            tokens=tokens,
            model_flops=tokens * self.shape.flops(blocks, self.length, logits=n_logits),
            sae_flops=tokens * 4 * d * width,
            traffic=n_logits * tokens * self.shape.vocab_size * LOGIT_BYTES,
            read=self.model_bytes,
            memory=max(
                self.loading_bytes,
                self.loaded_bytes + self._logits(EVALUATED_ROWS, LOGIT_COPIES) + 8 * batch * width,
            ),
        )

    def features(self, run: RunPlan) -> Cost:
        """The texts through the model up to the hook and through the SAE."""
        windows = min(self.n_windows, self.plan.features.corpus_windows)
        tokens = windows * self.length
        d, width = self.shape.d_model, run.sae.n_features(self.shape.d_model)
        return self._cost(
            "features",
            run.name,
            tokens=tokens,
            model_flops=tokens * self.shape.flops(run.layer + 1, self.length),
            sae_flops=tokens * 2 * d * width,
            read=self.model_bytes,
            memory=self.loading_bytes + 3 * 4 * d * width,
        )

    def _cost(
        self,
        rule: str,
        name: str,
        *,
        tokens: float = 0,
        steps: float = 0,
        model_flops: float = 0,
        sae_flops: float = 0,
        pair_flops: float = 0,
        traffic: float = 0,
        disk: float = 0,
        read: float = 0,
        memory: float = 0,
    ) -> Cost:
        machine = self.machine
        seconds = (
            machine.start_seconds
            + steps * machine.step_ms / 1e3
            + model_flops / machine.model_tflops / 1e12
            + sae_flops / machine.sae_tflops / 1e12
            + pair_flops / machine.pair_tflops / 1e12
            + traffic / machine.bandwidth_gb_s / 1e9
            + read / machine.disk_gb_s / 1e9
        )
        flops = model_flops + sae_flops + pair_flops
        memory += PROGRAM_GB * 1e9
        return Cost(rule, name, tokens, flops, disk, memory, seconds)
