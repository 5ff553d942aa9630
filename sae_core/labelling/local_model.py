"""A chat model in Hugging Face's format, run on this machine."""

import hashlib
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_core.labelling.chat import Refused, Reply
from sae_core.labelling.config import LabellerConfig
from sae_core.labelling.prompts import Question
from sae_core.models.model_places import model_place
from sae_core.train_config import ModelConfig
from sae_core.utils.errors import SAEError, one_line


class Loaded(NamedTuple):
    """A model in memory."""

    model: Any
    tokenizer: Any


class LocalModel:
    """The labeller and the scorer, loaded when they are first asked."""

    where = "no text leaves this machine: a local model is asked"

    def __init__(self, config: LabellerConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._loaded: dict[str, Loaded] = {}

    async def ask(self, question: Question) -> Reply:
        """The model's answer. With a temperature it is sampled, with a seed that the question
        makes."""
        if question.model not in self._loaded:
            self._loaded[question.model] = _load(question.model, self.device)
        model, tokenizer = self._loaded[question.model]
        tokens = _tokens(tokenizer, question).to(self.device)
        n_in, most = tokens.shape[1], self.config.answer_tokens
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and n_in + most > context:
            raise Refused(f"{n_in} tokens and an answer of {most} exceed its context of {context}")
        temperature = self.config.label_temperature
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if temperature:
            how = {"do_sample": True, "temperature": temperature}
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(_seed(question))
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=most,
                pad_token_id=tokenizer.eos_token_id,
                **how,
            )
        answer = output[0, n_in:]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        return Reply(text, n_in, len(answer), len(answer) == most)

    async def close(self) -> None:
        """Forget the models."""
        self._loaded.clear()


def _load(name: str, device: torch.device) -> Loaded:
    try:
        place = model_place(ModelConfig(model_name=name))
        tokenizer = AutoTokenizer.from_pretrained(place.source, revision=place.revision)
        model = AutoModelForCausalLM.from_pretrained(
            place.source, revision=place.revision, dtype="auto"
        )
    except SAEError as error:
        raise SAEError(str(error).replace("--model-name", "--labeller")) from error
    except (OSError, ValueError) as error:
        raise SAEError(
            f"--labeller {name}: not a chat model in Hugging Face's format ({one_line(error)})"
        ) from error
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    return Loaded(model.eval(), tokenizer)


def _tokens(tokenizer: Any, question: Question) -> torch.Tensor:
    """(1, L) the request, in the model's own form if it has one."""
    if tokenizer.chat_template is None:
        text = f"{question.system}\n\n{question.user}\n\nAnswer:\n"
        return tokenizer(text, return_tensors="pt").input_ids
    return tokenizer.apply_chat_template(
        question.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def _seed(question: Question) -> int:
    digest = hashlib.sha256(repr(question).encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
