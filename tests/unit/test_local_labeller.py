"""Labels by a local model: the command, and the form in which a model is asked."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from labelling_here import label_here
from transformers import AutoTokenizer

from sae_core.labelling.chat import Refused
from sae_core.labelling.config import LabellerConfig
from sae_core.labelling.label_files import read_labels
from sae_core.labelling.labels import Label
from sae_core.labelling.local_model import LocalModel
from sae_core.labelling.prompts import Question


def test_a_local_model(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random one, whose answers are in no schema."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    options = ["--labeller-backend", "local", "--answer-tokens", "4", "--labeller", str(tiny_model)]
    options += ["--labelled-features", "2", "--device", "cpu"]
    monkeypatch.setattr("sae_core.labelling.prompts.LABEL", "Label it.")
    printed = label_here(tmp_path, *options)
    assert "no text leaves this machine" in printed
    found = list(read_labels(tmp_path / "labels.jsonl").values())
    assert found == [Label(0, status="invalid answer"), Label(1, status="invalid answer")]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and all(1 <= a["tokens_out"] <= 4 for a in answers)
    message = label_here(tmp_path, *options, "--labeller", "./nowhere", ok=False)
    assert "--labeller ./nowhere" in message


def test_a_local_model_is_asked_in_its_own_form(tiny_model: Path, tmp_path: Path) -> None:
    """With its chat template; and without one, the same prompt as text."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    question = Question(str(folder), "label", "Be brief.", "What is it?", {})
    settings = LabellerConfig(labeller=str(folder), answer_tokens=3)
    model = LocalModel(settings, torch.device("cpu"))
    reply = asyncio.run(model.ask(question))
    whole = "[system]Be brief.[user]What is it?[assistant]"
    assert reply.tokens_in == len(tokenizer(whole).input_ids) and 1 <= reply.tokens_out <= 3
    assert asyncio.run(model.ask(question)) == reply
    sampling = LocalModel(replace(settings, label_temperature=1.0), torch.device("cpu"))
    assert asyncio.run(sampling.ask(question)) == asyncio.run(sampling.ask(question))
    plain = asyncio.run(model.ask(question._replace(model=str(tiny_model))))
    assert plain.tokens_in > 0
    too_long = question._replace(user="a b c " * 1000)
    with pytest.raises(Refused, match="exceed its context of 1024"):
        asyncio.run(model.ask(too_long))
