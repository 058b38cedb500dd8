"""The shape of the project: direction of imports, one name per op, what importing may load."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastlm
from fastlm.extension import extension
from fastlm.ops.dispatch import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[2]
LOSS_OPTION_FILES = 6  # that a new option of the losses touches
KERNEL_FILES = 15  # in kernels/, which people copy
LAZY_PACKAGES = (
    "triton", "matplotlib", "tyro", "tokenizers", "tqdm", "transformers", "pyarrow", "zstandard",
    "tensorboard", "wandb",
)  # fmt: skip

# csrc | kernels <- fastlm.ops <- optim, data, model <- train and everything around it.
BASE = {"fastlm.errors", "fastlm.extension", "fastlm.hardware"}  # importable anywhere in fastlm
MIDDLE = {
    "fastlm.optim",
    "fastlm.muon",
    "fastlm.model",
    "fastlm.model_config",
    "fastlm.schedule",
}  # and fastlm.data.*

PUBLIC_NAME = {  # of each op
    "cross_entropy": "cross_entropy_loss",
    "linear_cross_entropy": "linear_cross_entropy_loss",
    "adamw": "AdamW",
    "clip_grad_norm": "clip_gradients",
    "gather_batch": "get_batch",
    "causal_attention": "causal_attention",
}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts[:1] = ["fastlm", "kernels"]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files("fastlm", "kernels")}


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """The names that a file imports, "." first for relative ones: `from a import b` gives a.b.

    at_import_time: leaves out those inside functions and under `if TYPE_CHECKING`.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            joint = "" if source.endswith(".") else "."
            found.update(f"{source}{joint}{alias.name}" for alias in node.names)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if at_import_time and (is_function or is_typing):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def internal_imports(path: Path, **options) -> set[str]:
    """The modules of fastlm that a file imports; "fastlm" itself for names of the package."""
    modules = set()
    for name in imports(path, **options):
        if name.split(".")[0] == "fastlm":
            module = name if name in MODULES else name.rpartition(".")[0]
            modules.add(module if module in MODULES else "fastlm")
    return modules


def external_packages(path: Path, **options) -> set[str]:
    """The top-level packages outside the standard library and fastlm that a file imports."""
    names = {name.split(".")[0] for name in imports(path, **options)}
    return names - set(sys.stdlib_module_names) - {"", "fastlm"}


def needs_triton() -> set[str]:
    """The modules of kernels/ that cannot be imported without it: they, or siblings, import it."""
    kernels = {name.split(".")[-1]: path for name, path in MODULES.items() if "kernels." in name}
    found = {"triton"}
    while True:
        more = {
            name
            for name, path in kernels.items()
            if found & {part for i in imports(path, at_import_time=True) for part in i.split(".")}
        }
        if more <= found:
            return more
        found |= more


def level(module: str) -> int:
    if module in BASE or module.startswith("fastlm.kernels"):
        return 0
    if module == "fastlm.ops" or module.startswith("fastlm.ops."):
        return 1
    if module in MIDDLE or module == "fastlm.data" or module.startswith("fastlm.data."):
        return 2
    return 4 if module in ("fastlm.train", "fastlm") else 3


def test_the_parser_sees_every_form_of_import(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text(
        "import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\n"
        "if TYPE_CHECKING:\n    import h\ndef function():\n    import i\n"
        "class K:\n    import j\n"
    )
    assert imports(file) == {"a.b", "c.d", ".e", ".f.g", "h", "i", "j"}
    assert imports(file, at_import_time=True) == {"a.b", "c.d", ".e", ".f.g", "j"}
    assert {"fastlm.ops.dispatch", "fastlm.train", "fastlm.kernels", "fastlm"} <= set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"fastlm"}))
def test_imports_point_downwards(module):
    for imported in internal_imports(MODULES[module]):
        if imported == "fastlm":  # only for what the package itself defines
            names = {n for n in imports(MODULES[module]) if n.startswith("fastlm.")}
            assert {n for n in names if n.count(".") == 1 and n not in MODULES} == {
                "fastlm.__version__"
            }, module
        elif module in BASE:
            assert imported in BASE, f"{module} imports {imported}"
        elif imported not in BASE:
            assert level(imported) <= level(module), f"{module} imports {imported}"


def test_nothing_imports_the_trainer():
    importers = [m for m in MODULES if "fastlm.train" in internal_imports(MODULES[m])]
    assert importers == ["fastlm"]  # for train_loop, and there lazily:
    assert "fastlm.train" not in internal_imports(MODULES["fastlm"], at_import_time=True)


def test_no_import_cycles():
    graph = {m: internal_imports(path) - {"fastlm"} for m, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in finished:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_work_alone_in_another_project():
    for path in python_files("kernels"):
        # typing_extensions, which torch brings, for type checkers alone.
        assert external_packages(path) <= {"torch", "triton", "typing_extensions"}, path
        assert external_packages(path, at_import_time=True) <= {"torch", "triton"}, path
        assert not internal_imports(path), f"{path}: import siblings as `from .name import …`"


def test_only_torch_and_numpy_at_import_time():
    for path in MODULES.values():
        if path.parts[-2] != "kernels":
            assert external_packages(path, at_import_time=True) <= {"torch", "numpy"}, path


def test_ops_need_torch_and_numpy_only():
    for module, path in MODULES.items():
        if level(module) <= 1:
            needed = external_packages(path) - {"typing_extensions"}  # which torch brings
            assert needed <= {"torch", "numpy", "triton"}, path


def test_the_package_knows_neither_tests_nor_benches():
    helpers = {path.stem for path in python_files("tests", "bench")}
    for path in MODULES.values():
        assert not external_packages(path) & (helpers | {"tests", "bench", "pytest"}), path


def test_csrc_includes():
    """Kernels know std and siblings; bindings* alone pybind11, parallel.* alone threads."""
    threads = {"thread", "mutex", "condition_variable", "future", "omp.h", "pthread.h"}
    for path in (ROOT / "csrc").iterdir():
        included = set(re.findall(r"#\s*include\s*<(.+?)>", path.read_text()))
        assert "bindings" in path.name or not any("pybind11" in i for i in included), path
        assert path.stem == "parallel" or not included & threads, path
        assert not any(re.match(r"torch|ATen|c10|Python\.h", i) for i in included), path
        siblings = re.findall(r'#\s*include\s*"(.+?)"', path.read_text())
        assert all((ROOT / "csrc" / sibling).exists() for sibling in siblings), path


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_fastlm_loads_nothing_heavy_and_touches_no_device():
    run_python(f"""
import sys
import numpy, torch
loaded_by_torch = set(sys.modules)

def touched(*args, **kwargs):
    raise AssertionError("import fastlm asked for a device")

for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_properties"):
    setattr(torch.cuda, name, touched)
torch.backends.mps.is_available = touched
import fastlm
new = set(sys.modules) - loaded_by_torch
found = [name for name in {(*LAZY_PACKAGES, "fastlm._C", "fastlm.train")!r} if name in new]
assert not found, f"import fastlm loads {{found}}"
assert fastlm.train_loop is not None
""")


def test_ops_and_data_run_where_only_torch_and_numpy_are():
    run_python(f"""
import importlib, importlib.util, sys

class Without:
    # Finds all but the packages that an installation may lack.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LAZY_PACKAGES!r}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for module in {sorted(m for m in MODULES if level(m) <= 2)!r}:
    if module.removeprefix("fastlm.kernels.") not in {needs_triton()!r}:
        importlib.import_module(module)
import torch, fastlm
assert not any(importlib.util.find_spec(name) for name in ("tqdm", "triton"))
weight = torch.nn.Parameter(torch.ones(3, 5))
loss = fastlm.cross_entropy_loss(weight, torch.tensor([0, 1, 4]))
loss.backward()
assert abs(loss.item() - torch.tensor(5.0).log().item()) < 1e-6
assert fastlm.clip_gradients([weight], 0.1) > 0.1
fastlm.AdamW([weight]).step()
assert not torch.equal(weight, torch.ones(3, 5))
""")


def test_a_cpu_call_passes_through_no_file_about_triton():
    """Where Triton is installed, too (which torch itself then loads)."""
    kernels = {name: path for name, path in MODULES.items() if "kernels." in name}
    about_triton = {name for name, path in kernels.items() if "triton" in external_packages(path)}
    assert "fastlm.kernels.cross_entropy" in about_triton
    run_python(f"""
import sys, torch, fastlm
x, weight = torch.randn(3, 4, requires_grad=True), torch.nn.Parameter(torch.randn(5, 4))
y = torch.tensor([0, 1, 4])
fastlm.linear_cross_entropy_loss(x, weight, y).backward()
fastlm.cross_entropy_loss(x @ weight.T, y).backward()
fastlm.clip_gradients([weight], 0.1)
fastlm.AdamW([weight], max_grad_norm=1.0).step()
fastlm.check_labels()
met = {about_triton!r} & set(sys.modules)
assert not met, met
""")


def test_a_loss_option_is_named_in_few_files():
    sources = [*python_files("fastlm/ops", "kernels"), *(ROOT / "csrc").iterdir()]
    naming = [path.name for path in sources if "label_smoothing" in path.read_text("utf-8")]
    assert len(naming) <= LOSS_OPTION_FILES, naming


@pytest.mark.parametrize("op", sorted(IMPLEMENTATIONS))
def test_one_op_one_name(op):
    for path in (f"fastlm/ops/{op}.py", f"tests/*/test_{op}.py", f"bench/bench_{op}.py"):
        assert list(ROOT.glob(path)), f"op {op} has no {path}"
    assert PUBLIC_NAME[op] in fastlm.__all__
    module = importlib.import_module(f"fastlm.ops.{op}")
    references = [n for n in vars(module) if n.endswith("_reference")]
    assert references, f"fastlm/ops/{op}.py has no readable reference"
    # A kernel that the dispatcher does not know would be dead code.
    for folder, implementation in (("csrc", "cpp"), ("kernels", "triton")):
        if list((ROOT / folder).glob(f"{op}.*")):
            assert implementation in IMPLEMENTATIONS[op], f"{folder}/{op} is never dispatched to"


def test_every_kernel_file_belongs_to_an_op():
    """A file is named after an op (what follows the name is free), or its siblings use it."""

    def strangers(folder: str, uses: Callable[[Path], set[str]]) -> set[str]:
        files = [path for path in (ROOT / folder).iterdir() if path.is_file()]
        used = {stem for path in files for stem in uses(path) - {path.stem}}
        named = {path.stem for path in files if path.stem.startswith(tuple(IMPLEMENTATIONS))}
        return {path.stem for path in files} - used - named

    def python_uses(path: Path) -> set[str]:
        return {part for name in imports(path) for part in name.split(".")}

    def cpp_uses(path: Path) -> set[str]:
        return {Path(i).stem for i in re.findall(r'#\s*include\s*"(.+?)"', path.read_text())}

    # The optimizer's kernels are adamw's and clip_grad_norm's, which the dispatcher names.
    dispatched = {
        module.split(".")[-1] for op in IMPLEMENTATIONS.values() for module in op.values()
    }
    # The model's own, which have nothing to choose from: torch's functions run where they do not.
    models = {"rope", "swiglu"}
    assert strangers("fastlm/ops", python_uses) <= {"__init__", *dispatched, *models}
    assert strangers("kernels", python_uses) <= {"__init__", *models}
    assert len(list((ROOT / "kernels").glob("*.py"))) <= KERNEL_FILES
    assert {s for s in strangers("csrc", cpp_uses) if not s.startswith("bindings_")} == set()


def test_every_implementation_can_be_imported():
    for implementations in IMPLEMENTATIONS.values():
        for name, module in implementations.items():
            assert module in MODULES
            if name != "triton":
                importlib.import_module(module)


def test_readme_names_every_op_and_files_that_exist():
    readme = (ROOT / "README.md").read_text("utf-8")
    for op in IMPLEMENTATIONS:
        assert re.search(rf"^\| `?{op}`? \|.*`{PUBLIC_NAME[op]}`", readme, re.MULTILINE), op
    paths = set(re.findall(r"`((?:fastlm|csrc|kernels|tests|bench)/[\w./*<>{},-]+)`", readme))
    assert len(paths) > 5
    paths -= {"tests/adapters.py"}  # of CS336's assignment
    assert not [path for path in paths if "<" not in path and not list(ROOT.glob(path))]


def test_no_source_file_is_long():
    """A file is read in one sitting."""
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder in ("fastlm", "csrc", "kernels", "tests", "bench"):
        suffixes = (".py", ".pyi", ".h", ".inc", ".cpp")
        sources += [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources}
    assert len(lengths) > 40
    assert not {name: lines for name, lines in lengths.items() if lines > 450}


@pytest.mark.parametrize("name", fastlm.__all__)
def test_public_names_exist_and_are_documented(name):
    value = getattr(fastlm, name)
    docstring = value.__doc__ or ""  # not inspect.getdoc, which finds a base class's
    generated = docstring.startswith(f"{name}(")  # by @dataclass
    assert docstring.strip() and not generated, f"fastlm.{name} has no docstring"
    assert inspect.isclass(value) or inspect.isfunction(value)


def test_stub_file_lists_exactly_what_the_extension_has():
    module = extension()
    stub = ast.parse((ROOT / "fastlm" / "_C.pyi").read_text())
    functions = {n.name: n for n in stub.body if isinstance(n, ast.FunctionDef)}
    classes = {n.name: n for n in stub.body if isinstance(n, ast.ClassDef)}
    constants = {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign)}
    public = {name for name in dir(module) if not name.startswith("_")}
    assert set(classes) == {name for name in public if inspect.isclass(getattr(module, name))}
    for name, stub_class in classes.items():
        methods = {n.name: n for n in stub_class.body if isinstance(n, ast.FunctionDef)}
        actual = {n for n in dir(getattr(module, name)) if not n.startswith("_")}
        assert set(methods) - {"__init__"} == actual
        for method in methods.values():
            signature = getattr(getattr(module, name), method.name).__doc__.splitlines()[0]
            parameters = re.findall(r"(\w+): ", signature)
            assert [a.arg for a in method.args.args] == parameters, signature
    public -= set(classes)
    assert set(functions) == {name for name in public if callable(getattr(module, name))}
    assert constants == {name for name in public if not callable(getattr(module, name))}
    for name, function in functions.items():
        signature = getattr(module, name).__doc__.splitlines()[0]
        parameters = re.findall(r"(\w+): ", signature)
        assert [a.arg for a in function.args.args] == parameters, signature
