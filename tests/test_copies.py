"""The scripts stay single files and one family: same-named code is the same text, and every script has the skeleton.

Reads the scripts as text and syntax trees; nothing is imported.
"""

import ast
import importlib.metadata
import re
import sys
from itertools import combinations

import harness
import pytest

MAY_DIFFER = {"Args", "update", "main", "RESUME_MAY_CHANGE"}  # what makes a script the script it is
SECTIONS = ("The idea", "Networks", "The update", "Plumbing", "Training")  # beginnings of their banners, in this order
OFFLINE_FLAGS = """dataset env_id seed num_seeds num_updates batch_size gamma eval_every eval_episodes eval_workers
    device run_dir resume evaluate checkpoint_every capture_video""".split()

scripts = pytest.mark.parametrize("script", harness.SCRIPTS, ids=lambda path: path.stem)


def names_of(node):
    """Names that a statement at module level defines: of a function, a class, or plain assignments."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets for name in ast.walk(target or node) if target and isinstance(name, ast.Name)]


def definitions(path):
    """{name: source text} of what a script defines at module level: decorators, comments directly above and inside,
    and the comment behind the last line included. What one name gathers in several statements is joined."""
    lines, found = path.read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        for name in names_of(node):
            found[name] = found.get(name, "") + "\n".join(lines[first : node.end_lineno]) + "\n"
    return found


def differing_copies(paths):
    """(name, script, script) for every name that two scripts define with different text."""
    of_script = {path: definitions(path) for path in paths}
    return [
        (name, a.name, b.name)
        for a, b in combinations(paths, 2)
        for name in sorted(of_script[a].keys() & of_script[b].keys() - MAY_DIFFER)
        if of_script[a][name] != of_script[b][name]
    ]


def banners(path):
    """[(line, title), ...] of the sections: comments between two rules."""
    lines = path.read_text().splitlines()
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"# -{60,}", line)]
    return [(i + 2, lines[i + 1].removeprefix("# ")) for i in rules[::2]]


def args_fields(path):
    """[(name, docstring or None), ...] of the dataclass Args."""
    body = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    fields = []
    for node, following in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            text = following.value if isinstance(following, ast.Expr) else None
            is_text = isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value.strip()
            fields.append((node.target.id, text.value if is_text else None))
    return fields


def is_network(node):
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "nn.Module" for base in node.bases)


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


def test_same_name_same_text():
    assert len(harness.SCRIPTS) >= 2
    differing = differing_copies(harness.SCRIPTS)
    assert not differing, "\n".join(f"{name} differs between {a} and {b}" for name, a, b in differing)


def test_the_comparison_sees_the_plumbing():
    """The scripts do share what CONVENTIONS.md calls the same in every script: the test above compares something."""
    everywhere = "SCRIPT fail parse_args check_range choose_device normalized_score open_run_dir"
    everywhere += " write_atomically load_checkpoint on_stop_signal"
    on_mujoco = "MLP Adam D4RL_REFERENCES ENV_PACKAGES make_env policy_of_seed run_episodes Evaluator evaluate_run"
    on_mujoco += " print_result"
    for paths, names in (
        (harness.SCRIPTS, everywhere),
        ([path for path in harness.SCRIPTS if not path.stem.endswith("_atari")], on_mujoco),
    ):
        assert not set(names.split()) - set.intersection(*(set(definitions(path)) for path in paths))


SAMPLE = """\
import math

SIZE = 3  # as in the paper
# why these
NAMES = {
    "a": 1,  # first
}
NAMES |= {"b": 2}


@property
def double(x):
    '''Twice x.'''
    # exact for powers of two
    return 2 * x  # no rounding


class Net:
    width = 4

    def forward(self, x):
        return x  # (S, B)


def update(x):
    return x
"""


@pytest.mark.parametrize(
    "old, new, name",
    [
        ("2 * x", "3 * x", "double"),
        ("Twice x.", "Twice x", "double"),
        ("two\n", "twos\n", "double"),
        ("no rounding", "no roundinG", "double"),
        ("@property", "@propertY", "double"),
        ("def double(x)", "def double(x, )", "double"),
        ("width = 4", "width = 5", "Net"),
        ("# (S, B)", "# (S, C)", "Net"),
        ("SIZE = 3", "SIZE = 4", "SIZE"),
        ("the paper", "the papers", "SIZE"),
        ('"a": 1', '"a": 2', "NAMES"),
        ("# why these", "# why those", "NAMES"),
        ("# first", "# First", "NAMES"),
        ('"b": 2', '"b": 3', "NAMES"),
    ],
)
def test_the_comparison_notices_one_character(tmp_path, old, new, name):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(SAMPLE)
    assert SAMPLE.count(old) == 1
    b.write_text(SAMPLE)
    assert differing_copies([a, b]) == []
    b.write_text(SAMPLE.replace(old, new))
    assert differing_copies([a, b]) == [(name, "a.py", "b.py")]


def test_the_comparison_allows_what_may_differ(tmp_path):
    """Other `update`s, other positions in the file, and names of only one script are no difference."""
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(SAMPLE)
    b.write_text("import os\n\n\ndef other():\n    pass\n\n\n" + SAMPLE.replace("    return x\n", "    return -x\n"))
    assert differing_copies([a, b]) == []


@scripts
def test_a_name_is_defined_once(script):
    """A second definition would silently replace the first; constants may be extended with |=."""
    names = [
        name
        for node in ast.parse(script.read_text()).body
        if not isinstance(node, ast.AugAssign)
        for name in names_of(node)
    ]
    assert sorted(names) == sorted(set(names))


# ---------------------------------------------------------------------------------------------------------------------
# Single files
# ---------------------------------------------------------------------------------------------------------------------


@scripts
def test_imports_come_from_packages_only(script):
    """Standard library and installed packages; no other script, no tests, no shared module, nothing relative."""
    packages = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    own = {path.stem for path in harness.ROOT.rglob("*.py") if "site-packages" not in path.parts}
    own |= {"algorithms", "tests"}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            top = module.split(".")[0]
            assert top in packages and top not in own, f"line {node.lineno}: import {module}"
    for trick in ("sys.path", "importlib.util", "runpy", "exec(", "site.addsitedir"):
        assert trick not in script.read_text()
    assert not (script.parent / "__init__.py").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The skeleton
# ---------------------------------------------------------------------------------------------------------------------


@scripts
def test_docstring(script):
    """Paper, idea, equations by number, differences, and commands that the script's own flags allow."""
    doc = ast.get_docstring(ast.parse(script.read_text()))
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", doc) and re.search(r"\b(19|20)\d\d\b", doc)
    assert re.search(r"^Idea", doc, re.M) and re.search(r"^Objective", doc, re.M) and re.search(r"^Expected", doc, re.M)
    assert len(re.findall(r"\(\d+\)", doc)) >= 3, "equation numbers"
    assert re.search(r"^What differs from the papers? and (its|their) code, and why", doc, re.M)
    commands = re.findall(rf"python algorithms/{script.stem}\.py(.*)", doc)
    assert commands
    flags = {name.replace("_", "-") for name, _ in args_fields(script)}
    assert {flag for command in commands for flag in re.findall(r"--([a-z0-9-]+)", command)} <= flags


@scripts
def test_order_of_sections(script):
    """Docstring, imports, Args, (idea,) networks, update, plumbing, training, main; each part in its section."""
    tree, found = ast.parse(script.read_text()), banners(script)
    ranks = [next((i for i, s in enumerate(SECTIONS) if title.startswith(s)), None) for _, title in found]
    assert None not in ranks and ranks == sorted(ranks), found
    assert set(ranks) >= {1, 2, 3, 4}, found
    if "dataset" in dict(args_fields(script)):
        assert 0 in ranks, "an offline script shows its idea in a section of its own"

    def section(node):
        return max((SECTIONS[rank] for (line, _), rank in zip(found, ranks) if line < node.lineno), key=SECTIONS.index)

    nodes = {name: node for node in tree.body for name in names_of(node)}
    kinds = [type(node) for node in tree.body]
    last_import = max(i for i, kind in enumerate(kinds) if kind in (ast.Import, ast.ImportFrom))
    assert isinstance(tree.body[0], ast.Expr) and set(kinds[1 : last_import + 1]) <= {ast.Import, ast.ImportFrom}
    assert names_of(tree.body[last_import + 1]) == ["Args"]
    assert nodes["Args"].end_lineno < found[0][0]
    for node in tree.body:
        if is_network(node):
            assert section(node) == "Networks", node.name
    for name, expected in (
        ("MLP", "Networks"),
        ("update", "The update"),
        ("parse_args", "Plumbing"),
        ("make_env", "Plumbing"),
        ("load_dataset", "Plumbing"),
        ("Evaluator", "Plumbing"),
        ("open_run_dir", "Plumbing"),
        ("main", "Training"),
    ):
        assert name not in nodes or section(nodes[name]) == expected, name
    assert names_of(tree.body[-2]) == ["main"]
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()"


@scripts
def test_every_flag_is_explained(script):
    """A docstring under each field: it is what --help shows. Offline scripts share their flags' names."""
    fields = dict(args_fields(script))
    assert len(fields) > 10 and [name for name, text in fields.items() if text is None] == []
    if "dataset" in fields:
        assert not set(OFFLINE_FLAGS) - fields.keys()


@scripts
@pytest.mark.parametrize("document", ["README.md", "benchmarks.md"])
def test_documents_name_every_script(script, document):
    assert script.name in (harness.ROOT / document).read_text()


def test_the_checks_notice(tmp_path):
    """The helpers behind the tests above find a missing docstring, and banners as they are written."""
    path = tmp_path / "a.py"
    path.write_text('class Args:\n    a: int = 1\n    """one"""\n    b: int = 2\n    c: int = 3\n    """ """\n')
    assert args_fields(path) == [("a", "one"), ("b", None), ("c", None)]
    rule = "# " + "-" * 117
    path.write_text(f"x = 1\n{rule}\n# Networks. All.\n# More.\n{rule}\ny = 2\n\n{rule}\n# The update\n{rule}\n")
    assert banners(path) == [(3, "Networks. All."), (9, "The update")]
