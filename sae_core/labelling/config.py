"""The settings of labels by a language model."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal
from urllib.parse import urlsplit

from sae_core.settings.groups import FromEnvironment
from sae_core.utils.errors import SAEError
from sae_core.utils.limits import (
    Limits,
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Text,
    check_limits,
)

KEY = "OPENAI_API_KEY"
"""Variable with the endpoint's key, which is stored nowhere else."""


@dataclass(frozen=True)
class LabellerConfig:
    """Which language model labels features, what it is asked, and how much."""

    labeller: Text | None = None
    """The model that labels: its name at the endpoint, or a Hub id or directory if it is local."""

    labeller_backend: Literal["endpoint", "local"] = "endpoint"
    """`endpoint` asks a service with OpenAI's interface; `local` runs a chat model in Hugging
    Face's format on this machine."""

    label_scorer: Text | None = None
    """The model that scores the labels; by default the one that labels."""

    score_labels: bool = True
    """Score each label by detection and fuzzing, on windows that the labeller has not seen."""

    labelled_features: PositiveInt | None = 200
    """How many features are labelled: the first in the file of features, which begins with those
    whose default label says most. Null takes all active ones."""

    scored_at_once: PositiveInt = 5
    """Windows that a scorer judges in one request."""

    most_tokens: PositiveInt = 2_000_000
    """Ceiling on the tokens of all requests and answers about one SAE. No request starts that might
    exceed it; the rest is left unlabelled."""

    answer_tokens: PositiveInt = 400
    """Ceiling on the tokens of one answer. A model that reasons before it answers needs more."""

    label_temperature: Annotated[float, Limits(minimum=0, maximum=2)] | None = 0.0
    """Sampling temperature, or null to send none, for models that accept none."""

    structured_answers: bool = True
    """Have the endpoint hold answers to the schema (`response_format`). Set it to false if the
    endpoint cannot. Answers are checked in either case."""

    label_seed: NaturalInt = 0
    """Seed of the choice of windows that do not activate a feature."""

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def scorer(self) -> str:
        """The name of the model that scores."""
        return self.label_scorer or self.labeller or ""


@dataclass(frozen=True)
class LabellingConfig(LabellerConfig):
    """Labels of features by a language model, and scores of these labels."""

    label_features: bool = False
    """Have features labelled by a language model. Unless it is local, windows of the texts are
    sent to the endpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_features and not self.labeller:
            raise SAEError("--label-features needs --labeller: name the model that labels")


@dataclass(frozen=True)
class AskingConfig:
    """How a language model is asked: nothing here changes a label."""

    endpoint: str | None = field(default_factory=FromEnvironment("OPENAI_BASE_URL"))
    """Address of the service, such as http://127.0.0.1:8000/v1 (default: $OPENAI_BASE_URL). Its key
    is read from the variable OPENAI_API_KEY only."""

    requests_at_once: PositiveInt = 4
    """Requests that wait for an answer at a time."""

    request_seconds: PositiveFloat = 60.0
    """Seconds that one request may take altogether."""

    request_tries: PositiveInt = 5
    """How often a request is sent, at most, while it fails; five times as often while the endpoint
    asks to wait (`Retry-After`)."""

    price_in: NaturalFloat = 0.0
    """Price of a million tokens of requests, for the estimate of a dry run."""

    price_out: NaturalFloat = 0.0
    """Price of a million tokens of answers."""

    def __post_init__(self) -> None:
        check_limits(self)


def check_endpoint(url: str) -> None:
    """Check that an address is one, and holds no key: addresses are stored and logged.

    Raises:
        SAEError: it is not, or holds one. The message does not repeat it.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - checks that it is a number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SAEError("--endpoint: must be an address like https://host/v1; see OPENAI_BASE_URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SAEError(
            f"--endpoint: the address at {parts.hostname} has a user, a query or a fragment, which "
            f"could be a key; leave them out and set {KEY}"
        )


def check_asking(config: LabellerConfig, asking: AskingConfig) -> None:
    """Check that there is a language model to ask.

    Raises:
        SAEError: none is named; or it is at an endpoint, and none is given, or no proper one. The
            variable may be set for other programs, so it is checked where it is needed only.
    """
    if not config.labeller:
        raise SAEError("--labeller: name the model that labels")
    if config.labeller_backend == "local":
        return
    if not asking.endpoint:
        raise SAEError(
            "--labeller: no endpoint is given that it can be asked at; set OPENAI_BASE_URL (or "
            "--endpoint), or use --labeller-backend local"
        )
    check_endpoint(asking.endpoint)


def check_labelling(config: LabellingConfig, asking: AskingConfig) -> None:
    """`check_asking`, if labels are wanted.

    Raises:
        SAEError: there is nothing to ask.
    """
    if config.label_features:
        check_asking(config, asking)


def api_key() -> str | None:
    """The endpoint's key, if one is set."""
    return os.environ.get(KEY, "").strip() or None
