"""Code of the user that the command line imports first: architectures and methods that it registers."""

import os
import sys
import traceback
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from deitkit.errors import RecipeError, reason_of
from deitkit.recipe.section import from_home

IMPORT = "DEITKIT_IMPORT"


def import_user_code() -> None:
    """Import the Python file or the module that ``$DEITKIT_IMPORT`` names, if it is set.

    A file may import others in its folder. Processes that this one starts import it too, wherever they run.

    Raises:
        RecipeError: It does not exist, or raises an error.
    """
    name = os.environ.get(IMPORT)
    if not name:
        return
    file = from_home(Path(name))
    if file.suffix == ".py":
        if not file.is_file():
            raise RecipeError(f"{IMPORT}={name} is not a file: name a Python file, or a module that is installed")
        file = file.resolve()
        os.environ[IMPORT] = str(file)
    try:
        if file.suffix == ".py":
            _import_file(file)
        else:
            import_module(name)
    except Exception as error:  # the user's code may raise any
        frames = traceback.extract_tb(error.__traceback__)
        ours = (__file__, "importlib")
        of_others = [frame for frame in frames if not any(name in frame.filename for name in ours)]
        places = [f"; line {frame.lineno} of {frame.filename}" for frame in of_others]
        raise RecipeError(
            f"{IMPORT}={name} cannot be imported ({type(error).__name__}: {reason_of(error)}{(places or [''])[-1]}): "
            f"correct it, or leave {IMPORT} out"
        ) from error


def _import_file(file: Path) -> None:
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last, so that no file there takes the name of a library
    spec = spec_from_file_location(f"deitkit_user_{file.stem}", file)
    assert spec is not None  # for every name that ends in .py
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # before it runs, as dataclasses need
    spec.loader.exec_module(module)
