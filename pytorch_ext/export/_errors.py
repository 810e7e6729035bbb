import importlib
from types import ModuleType


class ExportError(Exception):
    """A model or file that cannot be exported or shown, in one sentence for the user."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def optional(name: str) -> ModuleType:
    """A package of the extra ``export``.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ExportError(f"{error.name} is not installed: pip install 'pytorch-ext[export]'") from None
