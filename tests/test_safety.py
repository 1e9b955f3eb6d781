"""Nothing from outside is unpickled or executed, and no name from outside leads out of its folder or into a page."""

import ast
from pathlib import Path

import pytest

import deitkit
from deitkit.data.sources.archives import _inside
from deitkit.distillation.methods import find_method
from deitkit.errors import RecipeError
from deitkit.recipe.load import parse_recipe
from deitkit.run.folder import folder_name

SOURCE = Path(deitkit.__file__).parent
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "subprocess.run", "subprocess.Popen",
}  # fmt: skip
TRAVERSALS = ("../x", "/etc/x", "a/../../x", "..", "a/b", "a\\b", "a\nb", "", ".hidden", "x" * 300)


def unsafe_calls(text: str) -> list[str]:
    """Return the calls in a program that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        loads = (name == "torch.load" and given.get("weights_only") != "True") or (
            name == "np.load" and given.get("allow_pickle", "False") != "False"
        )
        if name in FORBIDDEN or loads:
            found.append(name)
    return found


def test_nothing_in_the_package_unpickles_or_runs_text() -> None:
    found = {str(path): unsafe_calls(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    assert len(found) > 50
    pools = SOURCE / "comparison" / "pools.py"  # starts this program itself, and by a list of words, without a shell
    assert {path: calls for path, calls in found.items() if calls} == {str(pools): ["subprocess.Popen"]}
    assert "[sys.executable, *command]" in pools.read_text(encoding="utf-8")
    assert "shell=" not in pools.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "eval(x)", "yaml.load(x)"],
)
def test_an_unsafe_call_would_be_seen(text: str) -> None:
    assert unsafe_calls(text)


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_variant_or_method_is_called_like_a_path(name: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe({"variants": {name: {"train": {"epochs": 3}}}})
    with pytest.raises(RecipeError):
        find_method(name)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ".."])
def test_annotations_do_not_lead_out_of_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leads out"):
        _inside(tmp_path, name)


@pytest.mark.parametrize("name", [*TRAVERSALS, "C:\\x", "\0"])
def test_no_name_of_a_recipe_leads_out_of_runs(name: str) -> None:
    written = folder_name(name)
    assert (Path("runs") / written).resolve().parent == Path("runs").resolve()
    assert len(written) < 200


@pytest.mark.parametrize("name", ["digits", "cifar10-cpu", "my run_2.1", "übung"])
def test_usual_names_of_recipes_are_those_of_their_folders(name: str) -> None:
    assert folder_name(name) == name
