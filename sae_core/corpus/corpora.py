"""The texts of a corpus, whatever form they have."""

from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

from sae_core.corpus.forms import LINES, LIST, PARQUET, PLAIN, corpus_files, form_of, passed_over
from sae_core.corpus.hub import find_dataset
from sae_core.corpus.records import (
    Record,
    fields_of,
    json_lines,
    parquet,
    subject_of,
    text_file,
    text_of,
)
from sae_core.corpus.token_writer import Label, Text
from sae_core.corpus.tokenise import Corpus
from sae_core.data_processing.sources import Sources, sources_path
from sae_core.data_processing.texts import stream_texts
from sae_core.settings.texts import CorpusConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.files import file_sha256

MOST_SUBJECTS = 1000
"""More of them are no subjects, but some other field."""

SHOWN = 10
"""Subjects that a message lists."""


def read_corpus(config: CorpusConfig) -> Corpus:
    """The corpus that the settings name; its texts are read when they are asked for.

    Raises:
        SAEError: there is no such file, folder or data set, or it has no form that is known.
    """
    if config.dataset_id:
        corpus = hub_dataset(config)
    else:
        assert config.data_path is not None
        files = corpus_files(config)
        is_one = files == [config.data_path]
        is_list = is_one and (not files[0].exists() or form_of(files[0]) == LIST)
        corpus = json_list(files[0]) if is_list else files_of_records(files, config)
        if is_list and config.subject_field:
            raise SAEError(
                f"--subject-field {config.subject_field}: a list of texts has no fields, and "
                f"{files[0]} is one; leave the option out, or give JSON lines or Parquet"
            )
    if config.max_tokens is None:
        return corpus
    key = f"{corpus.key} up to {config.max_tokens}"
    return corpus._replace(key=key, sha256=None, max_tokens=config.max_tokens)


def json_list(path: Path, option: str = "--data-path") -> Corpus:
    """A JSON list of texts, with the chapters that the file next to it names.

    Raises:
        SAEError: there is no such file, or the sources belong to other texts.
    """
    next(stream_texts(path, option))
    sources = Sources.load(path)
    chapters = sources.chapters if sources else ()

    def texts() -> Iterator[Text]:
        counts = (chapter.texts for chapter in chapters)
        origins = chain.from_iterable(map(repeat, range(len(chapters)), counts))
        return map(Text, stream_texts(path, option), chain(origins, repeat(0)))

    sha256 = file_sha256(path)
    about = file_sha256(sources_path(path)) if sources else ""
    return Corpus(
        texts,
        path.name,
        f"{sha256} {about}",
        sha256,
        labels=[Label(chapter.subject, chapter.file) for chapter in chapters] if sources else None,
        dropped=sources.dropped if sources else {},
    )


def files_of_records(files: list[Path], config: CorpusConfig) -> Corpus:
    """Files of any form, read one after the other."""
    assert config.data_path is not None
    name, is_folder = config.data_path.resolve().name, config.data_path.is_dir()
    labels: list[Label] | None = [] if config.subject_field else None

    def texts() -> Iterator[Text]:
        records = chain.from_iterable(_records(file, config) for file in files)
        found = chosen(records, config, name, labels)
        return _of_folder(found, config) if is_folder else found

    if passed := passed_over(config):
        what = "file is" if len(passed) == 1 else "files are"
        print(f"{config.data_path}: {len(passed)} {what} passed over, such as {passed[0].name}")
    # With the form, which follows from the name: a file that is renamed may be read as another one.
    hashes = [
        f"{file.relative_to(config.data_path)} {form_of(file)} {file_sha256(file)}"
        for file in files
    ]
    return Corpus(texts, name, f"{hashes} {_choice(config)}", labels=labels)


def _of_folder(texts: Iterator[Text], config: CorpusConfig) -> Iterator[Text]:
    """The texts of a folder's files; an error says how to leave a file out."""
    try:
        yield from texts
    except SAEError as error:
        raise type(error)(
            f"{error}; if this is no file of texts, leave it out with --data-pattern, which is "
            f"{config.data_pattern}"
        ) from error


def hub_dataset(config: CorpusConfig) -> Corpus:
    """A data set of the Hub, at the commit that its revision is now."""
    dataset = find_dataset(config)
    labels: list[Label] | None = [] if config.subject_field else None
    what = (config.dataset_id, config.dataset_name, config.dataset_split, dataset.commit)
    return Corpus(
        lambda: chosen(dataset.records(), config, dataset.name, labels),
        dataset.name,
        f"{what} {_choice(config)}",
        commit=dataset.commit,
        labels=labels,
    )


def _choice(config: CorpusConfig) -> tuple[object, ...]:
    """The settings that decide which texts are read."""
    return config.text_field, config.subject_field, config.subjects


def _records(file: Path, config: CorpusConfig) -> Iterator[Record]:
    form = form_of(file)
    if form == PLAIN:
        return text_file(file)
    if form == PARQUET:
        return parquet(file, fields_of(config))
    if form == LINES:
        return json_lines(file)
    texts = stream_texts(file)
    return (Record(f"{file}: item {number}", text) for number, text in enumerate(texts))


def chosen(
    records: Iterator[Record], config: CorpusConfig, name: str, labels: list[Label] | None
) -> Iterator[Text]:
    """The texts of the records, or of those with the wanted subjects.

    Args:
        labels: is filled with the subjects, in the order in which they come.

    Raises:
        SAEError: a record does not have the fields, or none has a wanted subject.
    """
    if config.subject_field is None or labels is None:
        yield from (Text(text_of(record, config.text_field)) for record in records)
        return
    labels.clear()
    numbers: dict[str, int] = {}
    others: dict[str, None] = {}
    for record in records:
        subject = subject_of(record, config.subject_field)
        if config.subjects and subject not in config.subjects:
            if len(others) < SHOWN:
                others[subject] = None
            continue
        if subject not in numbers:
            numbers[subject] = len(numbers)
            labels.append(Label(subject, name))
            if len(numbers) > MOST_SUBJECTS:
                raise SAEError(
                    f"{name}: --subject-field {config.subject_field}: has more than "
                    f"{MOST_SUBJECTS} values; name a field with fewer, or give --subjects"
                )
        yield Text(text_of(record, config.text_field), numbers[subject])
    if not numbers:
        raise SAEError(
            f"{name}: --subjects {' '.join(config.subjects)}: no text has this "
            f"{config.subject_field}; there are: {', '.join(other or '(none)' for other in others)}"
        )
