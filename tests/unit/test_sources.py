"""Where texts come from: the file beside the file of texts."""

import json
from pathlib import Path

import pytest

from sae_core.data_processing.sources import Chapter, Dropped, Sources, sources_path
from sae_core.data_processing.textbook_process import ProcessConfig, process
from sae_core.data_processing.texts import write_texts
from sae_core.utils.errors import SAEError

LIGHT = "Light is both a wave and a stream of particles.\n\nIt needs no medium at all to travel."
CELLS = (
    "# Cells\n\nA cell is the least unit of life.\n\nShort.\n\nIt needs no medium at all to travel."
)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    physics, life = tmp_path / "physics_chapters", tmp_path / "life"
    for folder, chapters in ((physics, [LIGHT, LIGHT]), (life, [CELLS])):
        folder.mkdir()
        for number, chapter in enumerate(chapters):
            (folder / f"{number}.md").write_text(chapter)
    return physics, life


@pytest.mark.parametrize("method", ["paragraphs", "sentences", "chunks", "lines"])
def test_every_text_has_its_chapter(
    method: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    config = ProcessConfig(folders=folders, output=tmp_path / "texts.json", method=method)  # type: ignore[arg-type]
    texts = process(config).texts
    sources = Sources.load(config.output)
    assert sources is not None and sources.subjects == ["physics", "life"]
    of_texts = [chapter for chapter in sources.chapters for _ in range(chapter.texts)]
    files = {text: chapter.file for text, chapter in zip(texts, of_texts, strict=True)}
    assert {file for text, file in files.items() if "wave" in text} == {"physics_chapters/0.md"}
    assert {file for text, file in files.items() if "cell" in text} == {"life/0.md"}
    assert [chapter.texts for chapter in sources.chapters if chapter.file.endswith("1.md")] == [0]
    assert sources.dropped["too short"] == Dropped(pieces=1, words=1)
    assert sum(chapter.words for chapter in sources.chapters) == sum(
        len(text.split()) for text in texts
    )


def test_subjects_can_be_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "texts.json"
    process(ProcessConfig(folders=folders, subjects=("light", "light"), output=output))
    sources = Sources.load(output)
    assert sources is not None and sources.subjects == ["light"]
    with pytest.raises(SAEError, match="--subjects light: 1 names for 2 folders"):
        ProcessConfig(folders=folders, subjects=("light",))


def test_texts_without_sources(tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    write_texts(texts, ["one"])
    assert Sources.load(texts) is None


def test_sources_of_other_texts_are_refused(tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    write_texts(texts, ["one"])
    Sources((Chapter("a", "a.md", 1, 1),), {}).save(texts)
    assert sources_path(texts) == tmp_path / "texts.sources.json"
    write_texts(texts, ["two"])
    with pytest.raises(
        SAEError, match="texts.sources.json: belongs to other texts than texts.json"
    ):
        Sources.load(texts)


@pytest.mark.parametrize("content", ["{", "[]", '{"texts_sha256": "a"}'])
def test_damaged_sources_are_named(content: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    write_texts(texts, ["one"])
    sources_path(texts).write_text(content)
    with pytest.raises(SAEError, match="texts.sources.json: not a readable file of sources"):
        Sources.load(texts)


def test_the_same_chapters_give_the_same_bytes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for name in ("a.json", "b.json"):
        process(ProcessConfig(folders=folders, output=tmp_path / name))
        found.append(sources_path(tmp_path / name).read_bytes())
    assert found[0] == found[1] and json.loads(found[0])["chapters"][0]["texts"] == 2
