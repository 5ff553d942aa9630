"""Which texts are read, and where what is made of them goes."""

from dataclasses import dataclass, field
from pathlib import Path

from sae_core.settings.groups import FromEnvironment
from sae_core.utils.errors import SAEError
from sae_core.utils.limits import PositiveInt, Text, check_limits
from sae_core.utils.naming import check_repo_id

DEFAULT_DATA_PATH = Path("sae_core/data/processed_data/processed_textbooks_all.json")


@dataclass(frozen=True)
class CorpusConfig:
    """Texts of any form: a file, a folder of files, or a data set of the Hugging Face Hub."""

    data_path: Path | None = None
    """A JSON list of texts, JSON lines (also `.gz` and `.zst`), Parquet, a text file, or a folder
    of such files."""

    data_pattern: Text = "*"
    """Which files of a folder are read, in alphabetical order; `**/*.txt` also reads its
    subfolders. Hidden files never are."""

    dataset_id: Text | None = None
    """A data set of the Hugging Face Hub, in place of --data-path."""

    dataset_name: Text | None = None
    """Configuration of the data set, where it has several."""

    dataset_split: Text = "train"
    """Split of the data set."""

    dataset_revision: Text | None = None
    """Branch, tag or commit of the data set, by default `main`."""

    dataset_streaming: bool = False
    """Read the data set from the Hub as it is tokenised, and keep no copy of its files; otherwise
    they are downloaded into the Hub's cache."""

    text_field: Text = "text"
    """Field that has the text; `a.b` is a field in another one."""

    subject_field: Text | None = None
    """Field that names the subject of a text, which is shown on the pages of features."""

    subjects: tuple[Text, ...] = ()
    """Subjects that are read, by default all."""

    max_tokens: PositiveInt | None = None
    """Number of tokens after which no further text is read."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.dataset_id:
            check_repo_id(self.dataset_id, "--dataset-id")
            if self.data_path not in (None, DEFAULT_DATA_PATH):
                raise SAEError(
                    f"--dataset-id {self.dataset_id}: give either --dataset-id or --data-path"
                )
        elif self.data_path is None:
            raise SAEError("--data-path: give it, or --dataset-id for a data set of the Hub")
        if self.subjects and not self.subject_field:
            raise SAEError("--subjects needs --subject-field, the field that names the subject")

    @property
    def place(self) -> str:
        """The option that names the texts, with its value."""
        return (
            f"--dataset-id {self.dataset_id}"
            if self.dataset_id
            else f"--data-path {self.data_path}"
        )


@dataclass(frozen=True)
class TextsConfig(CorpusConfig):
    """Where the texts come from; an SAE is evaluated on those that it was trained on."""

    data_path: Path = DEFAULT_DATA_PATH
    """A JSON list of texts, JSON lines (also `.gz` and `.zst`), Parquet, a text file, or a folder
    of such files."""

    token_root: Path | None = field(default_factory=FromEnvironment("SAE_CORE_TOKENS", kind=Path))
    """Folder of the tokenised texts, which later runs on the same texts with the same tokenizer
    use; by default `tokens` in the cache (default: $SAE_CORE_TOKENS)."""


@dataclass(frozen=True)
class OutputConfig(TextsConfig):
    """Where the texts come from and the results go."""

    output_root: Path = Path("sae_core/pretrained_models")
    """Folder of the final SAE directories."""

    checkpoint_root: Path = Path("sae_core/checkpoints")
    """Folder of the checkpoints."""

    run_name: str | None = None
    """Name of the SAE's folder; built from model, hook and SAE if omitted."""

    quiet: bool = False
    """Print only the SAE's path and errors."""
