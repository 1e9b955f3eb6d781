"""Images listed in a CSV file: its columns, its splits, its groups, and every mistake in a sentence."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deitkit.data.dataset import load_dataset
from deitkit.data.split import plan_splits
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a CSV file and the images of its rows (the first value of each)."""

    def write(header: str, rows: Sequence[str], *, images: bool = True, name: str = "list.csv") -> Path:
        for index, row in enumerate(rows):
            path = tmp_path / row.replace(";", ",").replace("\t", ",").partition(",")[0]
            if images and path != tmp_path:
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (index % 256, 3 * index % 256, 7)).save(path)
        (tmp_path / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return tmp_path / name

    return write


def load(path: Path, **fields: object):
    return load_dataset(DataRecipe(name=f"csv:{path}", **fields))  # type: ignore[arg-type]


def many(count: int = 12, split: str = "") -> list[str]:
    return [
        f"{split or 'x'}/{name}{index}.png,{name}{split and ',' + split}"
        for name in ("cat", "dog")
        for index in range(count)
    ]


@pytest.mark.parametrize(
    "header", ["path,label", "Image,Class", "filename,category", " file_name , label ", "\ufeffpath,label"]
)
def test_columns_are_found_by_their_usual_names(table: Callable[..., Path], header: str) -> None:
    data = load(table(header, many()))
    assert data.class_names == ("cat", "dog")
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 24


def test_of_two_columns_of_one_name_the_first_is_read(table: Callable[..., Path]) -> None:
    data = load(table("path,label,Label", [f"{row},other{index % 2}" for index, row in enumerate(many())]))
    assert data.class_names == ("cat", "dog")
    assert any("left out: 1 column" in remark and "(Label)" in remark for remark in data.remarks)


def test_paths_may_be_absolute(table: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    images, relative = table("path,label", many()), load(table("path,label", many()))
    for name in ("list.csv", "elsewhere/list.csv"):
        other = images.parent / name
        other.parent.mkdir(exist_ok=True)
        other.write_text("\n".join(["path,label", *(f"{images.parent}/{row}" for row in many())]) + "\n")
        monkeypatch.chdir(images.parent)
        for path in (Path(name), other):
            assert torch.equal(load(path).test.images, relative.test.images)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_are_found(table: Callable[..., Path], delimiter: str) -> None:
    rows = [row.replace(",", delimiter) for row in many()]
    assert load(table(f"path{delimiter}label", rows)).class_names == ("cat", "dog")


def test_a_split_column_divides_and_what_is_left_out_is_said(table: Callable[..., Path]) -> None:
    rows = many(8, "train") + many(3, "test") + many(2, "val") + many(2, "validation")
    data = load(table("path,label,split,photographer", [f"{row},me" for row in rows]))
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 6)
    assert data.names is not None
    assert all(data.names("validation", place).startswith("val/") for place in range(4))
    assert "left out: 4 rows of the split 'validation'" in data.remarks
    assert any("the validation images are those of 'val'" in remark for remark in data.remarks)
    assert "left out: 1 column of 'list.csv' (photographer)" in data.remarks


def test_a_validation_split_of_other_classes_is_not_used(table: Callable[..., Path]) -> None:
    rows = many(8, "train") + many(3, "test") + ["val/cat.png,cat,val"]
    data = load(table("path,label,split", rows))
    assert (len(data.train) + len(data.validation), len(data.test)) == (16, 6)
    assert "'val' has other classes than 'train', so the validation images are taken from 'train'" in data.remarks


def test_classes_that_are_numbers_are_in_the_order_of_numbers(table: Callable[..., Path]) -> None:
    rows = [f"x/{name}-{index}.png,{name}" for name in range(12) for index in range(5)]
    assert load(table("path,label", rows)).class_names == tuple(map(str, range(12)))
    mixed = [row.replace(",11", ",11b") for row in rows]
    assert load(table("path,label", mixed)).class_names[:3] == ("0", "1", "10")


def test_quoted_values_and_unicode(table: Callable[..., Path]) -> None:
    rows = [f'a{index}.png,"cat, tabby"' for index in range(6)] + [f"b{index}.png,Käfer" for index in range(6)]
    assert load(table("path,label", rows)).class_names == ("Käfer", "cat, tabby")


def test_no_group_is_divided(table: Callable[..., Path]) -> None:
    rows = [f"x/{name}{index}.png,{name},patient {index // 4}" for name in ("cat", "dog") for index in range(48)]
    data = load(table("path,label,group", rows), validation_fraction=0.25, test_fraction=0.25)
    splits = (data.train, data.validation, data.test)
    groups = [{int(image[0, 0, 0]) % 48 // 4 for image in split.images} for split in splits]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 12
    assert all(split.labels.unique().tolist() == [0, 1] for split in splits)


@given(st.integers(2, 4), st.integers(8, 20), st.integers(1, 6), st.integers(0, 5))
def test_groups_stay_whole_for_any_division(classes: int, groups: int, size: int, seed: int) -> None:
    labels = torch.arange(classes).repeat(groups * size)
    group = torch.arange(groups).repeat_interleave(classes * size)
    recipe = DataRecipe(name="csv:x", split_seed=seed, validation_fraction=0.2, test_fraction=0.25)
    plan = plan_splits(labels, None, [str(number) for number in range(classes)], recipe, group)
    parts = [set(group[part].tolist()) for part in (plan.train, plan.validation, plan.test)]
    assert sum(map(len, parts)) == groups
    assert len(plan.train) + len(plan.validation) + len(plan.test) == len(labels)
    again = plan_splits(labels, None, [str(number) for number in range(classes)], recipe, group)
    assert torch.equal(plan.test, again.test)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.3, 0.4, 0.45])
def test_a_share_of_groups_is_about_what_was_asked_for(share: float) -> None:
    labels, group = torch.arange(2).repeat(600), torch.arange(60).repeat_interleave(20)
    recipe = DataRecipe(name="csv:x", validation_fraction=0.2, test_fraction=share)
    plan = plan_splits(labels, None, ["a", "b"], recipe, group)
    assert len(plan.test) / len(labels) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        ("image_name,label", ["a.png,x"], "has no column 'path' (it has 'image_name', 'label'): name one path or"),
        ("path,colour", ["a.png,x"], "has no column 'label'"),
        ("path,label", [], "has no rows"),
        ("path,label", ["a.png,x", ",y"], "has no path in row 3"),
        ("path,label", ["a.png,x", "b.png, "], "has no label in row 3"),
        ("path,label", ["a.png,x", "a.png,y"], "has 'a.png' as 'x' and as 'y'"),
        ("path,label", ["a.png,x,1"], "more values than columns in row 2"),
        ("path,label,split", ["a.png,x,train", "b.png,x,dev"], "has the split 'dev': write train, or one of test"),
        ("path,label,split", ["a.png,x,test"], "has no row of the split 'train'"),
        ("path,label,split", ["a.png,x,train", "b.png,y,test"], "lacks"),
        ("path,label,split,group", ["a.png,x,train,p1", "b.png,x,test,p1"], "1 group in train and in test, such as 'p"),
        ("path,label,split,group", ["a.png,x,train,p1", "b.png,x,test,p2", "c.png,x,val,p1"],
         "1 group in train and in validation, such as 'p1'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(table: Callable[..., Path], header: str, rows: list[str], words: str) -> None:
    with pytest.raises(DataError) as caught:
        load(table(header, rows))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_are_missing_are_named(table: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"24 of 24 images are not in .*, such as 'x/cat0\.png'"):
        load(table("path,label", many(), images=False))


def test_too_few_groups_are_said(table: Callable[..., Path]) -> None:
    rows = [f"x/{name}{index}.png,{name},p{index // 6}" for name in ("cat", "dog") for index in range(12)]
    with pytest.raises(DataError, match=r"2 groups to divide, but a share of 0\.2 needs 5"):
        load(table("path,label,group", rows))


def test_too_few_images_for_a_share_of_groups_are_said(table: Callable[..., Path]) -> None:
    rows = [f"x/{name}{index}.png,{name},p{name}{index}" for name in ("ant", "bee", "cat") for index in range(8)]
    with pytest.raises(DataError, match=r"at most \d images of a class to divide, but a share of 0\.1 needs 10: raise"):
        load(table("path,label,group", rows))


def test_an_image_has_one_class_however_its_path_is_spelled(table: Callable[..., Path]) -> None:
    path = table("path,label", many())
    for spelling in ("./x/cat0.png", "x/../x/cat0.png", str(path.parent / "x" / "cat0.png")):
        path.write_text(f"path,label\n{chr(10).join(many())}\n{spelling},dog\n", encoding="utf-8")
        with pytest.raises(DataError, match="as 'cat' and as 'dog': an image has one class here"):
            load(path)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist: data\.name=csv:FILE needs"):
        load(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(DataError, match="is not a CSV file in UTF-8"):
        load(tmp_path / "binary.csv")


def test_a_path_without_its_kind_is_understood(table: Callable[..., Path], run: Run) -> None:
    path = table("path,label", many())
    code, _, errors = run("compare", "own-images", f"data.name={path}")
    assert code == 2
    assert f"did you mean csv:{path}?" in errors


@pytest.mark.parametrize("of_folder", ["NFC", "NFD"])
@pytest.mark.parametrize("of_files", ["NFC", "NFD"])
@pytest.mark.parametrize("of_cells", ["NFC", "NFD"])
def test_names_of_files_are_found_however_they_spell_an_accent(
    tmp_path: Path, of_folder: Any, of_files: Any, of_cells: Any
) -> None:
    folder = tmp_path / unicodedata.normalize(of_folder, "\u00e9t\u00e9")
    rows = [row.replace("cat", "caf\u00e9") for row in many()]
    for index, row in enumerate(rows):
        path = folder / unicodedata.normalize(of_files, row.partition(",")[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 3 * index, 7)).save(path)
    text = unicodedata.normalize(of_cells, "\n".join(["path,label", *rows]))
    (folder / "list.csv").write_text(text + "\n", encoding="utf-8")
    assert load(folder / "list.csv").class_names == ("caf\u00e9", "dog")
