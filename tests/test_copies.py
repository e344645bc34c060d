"""The scripts stay single files, small, and one family: same-named code is the same text, all keep one form."""

import ast
import difflib
import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
import tokenize
from itertools import combinations

import harness
import pytest
import tyro

MAY_DIFFER = {"Args", "Agent", "update", "main"}

BUDGETS = {  # tokens of code, of them plumbing, lines; tokens a line, definitions, lines of main
    (5_800, 3_800, 760, 11, 34, 115): "iql_red td3_bc_red crr_red",
    (7_000, 3_800, 880, 11, 34, 115): "cql_red dered_iql rvs_lds asac iql_scaled td3_bc_scaled",
    (7_800, 4_600, 960, 11, 34, 115): "awac bcq bred",
    (5_800, 3_700, 760, 11, 34, 115): "rem_atari qrdqn_atari ensemble_dqn_atari offline_dqn_atari c51_atari",
    (5_400, 3_500, 720, 11, 34, 115): "sac td3 dqn_atari rem_online_atari",
    (5_000, 5_000, 660, 11, 34, 115): "mood made_behavior",
}

scripts = pytest.mark.parametrize("script", harness.SCRIPTS, ids=lambda path: path.stem)


def names_of(node):
    """Names that a statement at module level defines: of a function, a class, or plain assignments."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def definitions(path):
    """{name: source text} of what a script defines at module level, with decorators and comments, also those
    directly above (but for a section's title). What one name gathers in several statements is joined."""
    lines = path.read_text().splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#") and not lines[first - 1].endswith("-"):
            first -= 1
        for name in names_of(node):
            found[name] = found.get(name, "") + "\n".join(lines[first : node.end_lineno]) + "\n"
    return found


def differing_copies(paths):
    """(name, script, script) for every name that two scripts define with different text."""
    of_script = {path: definitions(path) for path in paths}
    found = []
    for a, b in combinations(paths, 2):
        names = sorted(of_script[a].keys() & of_script[b].keys() - MAY_DIFFER)
        found += [(name, a.name, b.name) for name in names if of_script[a][name] != of_script[b][name]]
    return found


def sizes(text):
    """(tokens of code, of them below the first comment line with the word Plumbing, lines, tokens a line of
    code, definitions, lines of main). Comments, docstrings and line ends are no code."""
    tree = ast.parse(text)
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    quiet = {getattr(tokenize, kind) for kind in "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    rows = [token.start[0] for token in tokens if token.type not in quiet and token.start[0] not in docs]
    lines = text.splitlines()
    marks = [i for i, line in enumerate(lines, 1) if re.match(r"\s*#.*Plumbing", line)]
    plumbing = sum(row > min(marks, default=len(lines)) for row in rows)
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    main = sum(node.end_lineno - node.lineno + 1 for node in nodes if node.name == "main")
    return len(rows), plumbing, len(lines), round(len(rows) / len(set(rows)), 1), len(nodes), main


def test_same_name_same_text():
    differing = differing_copies(harness.SCRIPTS)
    assert not differing, "\n".join(f"{name} differs between {a} and {b}" for name, a, b in differing)


SAMPLE = '''\
# why these
NAMES = {"a": 1}  # first
NAMES |= {"b": 2}


# Plumbing -----
@property
def double(x):
    """Twice x."""
    # exact for powers of two
    return 2 * x  # no rounding


def update(x):
    return x
'''


def test_the_comparison_notices_one_character(tmp_path):
    """... but neither other places, nor other names, nor another update."""
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(SAMPLE)
    b.write_text("OTHER = 1\n\n" + SAMPLE.replace("    return x\n", "    return -x\n"))
    assert differing_copies([a, b]) == []
    changes = {"2 * x": "double", "rounding": "double", "@property": "double", "these": "NAMES", '"b"': "NAMES"}
    for old, name in changes.items():
        b.write_text(SAMPLE.replace(old, old.upper()))
        assert differing_copies([a, b]) == [(name, "a.py", "b.py")]


def size_table():
    """README's table: sizes, and which other script differs least, by lines removed and added."""
    lines = {path: path.read_text().splitlines() for path in harness.SCRIPTS}
    rows = ["| script | tokens of code | of them the method | nearest | lines that differ |", "|---|---|---|---|---|"]
    for path in harness.SCRIPTS:
        tokens, plumbing, *_ = sizes(path.read_text())
        others = []
        for other in lines.keys() - {path}:
            diff = difflib.unified_diff(lines[path], lines[other], n=0, lineterm="")
            others.append((sum(line[0] in "+-" for line in diff) - 2, other.name))
        differing, nearest = min(others)
        rows.append(f"| `{path.name}` | {tokens:,} | {tokens - plumbing:,} | `{nearest}` | {differing} |")
    return "\n".join(rows)


def with_sizes(readme):
    """README with the table of sizes as it should be, and the lines of each script in the tables of families."""
    readme = re.sub(r"(<!-- sizes.*?-->\n).*?(<!-- end -->)", lambda x: f"{x[1]}{size_table()}\n{x[2]}", readme, flags=re.S)
    for path in harness.SCRIPTS:
        num_lines = len(path.read_text().splitlines())
        readme = re.sub(rf"(\| `{path.name}` \| [^|]* \| )\d+( \|)", rf"\g<1>{num_lines}\2", readme)
    return readme


def test_readme():
    """Its sizes are right; the scripts' parsers take its commands."""
    readme = (harness.ROOT / "README.md").read_text()
    assert with_sizes(readme) == readme, "run python tests/test_copies.py"
    commands = re.findall(r"python algorithms/(\w+)\.py ([^`#&\n]*)", readme)
    assert len(commands) > 25
    for script, flags in commands:
        tyro.cli(harness.load(script).Args, args=shlex.split(flags))


def test_mutations_still_find_their_places():
    """... in the scripts; the mutations themselves run by hand: python tests/mutations.py."""
    command = [sys.executable, harness.ROOT / "tests" / "mutations.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sizes_are_counted_right():
    assert sizes(SAMPLE) == (14 + 20, 20, 15, round(34 / 7, 1), 2, 0)  # by hand


@scripts
def test_budget(script):
    (budget,) = [most for most, names in BUDGETS.items() if script.stem in names.split()]
    found = sizes(script.read_text())
    assert all(size <= most for size, most in zip(found, budget)), f"{found}, allowed {budget}"


@scripts
def test_imports_come_from_packages_only(script):
    """Standard library and installed packages; no script, no test, nothing relative."""
    packages = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    own = {path.stem for path in (*harness.SCRIPTS, *(harness.ROOT / "tests").glob("*.py"))}
    names = re.findall(r"^ *(?:from|import) ([\w.]+)(?: (?:import|as) .*)?$", script.read_text(), re.M)
    assert {name.split(".")[0] for name in names} <= packages - own
    assert not re.search(r"sys\.path\b|spec_from_file|import_module|runpy|exec\(", script.read_text())


@scripts
def test_form(script):
    """Each name defined once; every flag in one line with its help behind it; the sections in order, main() and
    its call last."""
    text = script.read_text()
    tree = ast.parse(text)
    names = [name for node in tree.body if not isinstance(node, ast.AugAssign) for name in names_of(node)]
    assert sorted(names) == sorted(set(names))

    (args,) = [node for node in tree.body if names_of(node) == ["Args"]]
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    for node in fields:
        behind = text.splitlines()[node.lineno - 1][node.end_col_offset :]
        assert node.lineno == node.end_lineno and re.match(r"  # \w", behind), node.target.id

    order = ["The idea", "Networks", "The update", "Plumbing", "Training"]
    found = [order.index(title) for title in re.findall(rf"^# ({'|'.join(order)})\b.* -+$", text, re.M)]
    assert found == sorted(found) and names_of(tree.body[-2]) == ["main"]
    if script.stem == "mood":  # which makes data and trains nothing
        return
    assert set(found) >= {1, 2, 3, 4}
    first = harness.SCRIPTS[0].with_stem("iql_red").read_text()
    assert text[text.index("if __name__") :] == first[first.index("if __name__") :]


@scripts
def test_documents(script):
    """The docstring has papers, idea, equations by number, differences; commands and flags to paste, which
    the script's parser takes. README.md and benchmarks.md name the script."""
    doc = ast.get_docstring(ast.parse(script.read_text()))
    assert len(doc.splitlines()) <= 45
    assert re.search(r"\b(19|20)\d\d,\s+arXiv:\d{4}\.\d{4,5}", doc)
    for start in "Idea", "Objective", "What differs from the", r"Expected: .*[a-z\d]":
        assert re.search(rf"^{start}", doc, re.M), start
    assert len(re.findall(r"\(\d+\)", doc)) >= 2, "equation numbers"
    Args = harness.load(script.stem).Args
    joined = re.sub(r"\\?\n +--", " --", doc)
    joined = re.sub(rf".*python algorithms/(?!{script.stem}\b).*", "", joined)  # what another script does first
    commands = re.findall(rf"python algorithms/{script.stem}\.py(.*)", joined)
    assert commands
    for flags in commands + re.findall(r"^[A-Z][^:]*: +(--.*)", joined, re.M):
        tyro.cli(Args, args=shlex.split(flags))
    assert set(re.findall(r"--(?:no-)?([a-z][\w-]+)", joined)) <= {x.replace("_", "-") for x in Args.__annotations__}
    for document in "README.md", "benchmarks.md":
        assert script.name in (harness.ROOT / document).read_text(), document


OWN = '''
def load_data(args):
    obs = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    action = np.tanh(obs[:, :2])
    reward = obs[:, 2]
    terminated = np.arange(60) % 20 == 19
    returns = reward.reshape(3, 20).sum(1)
    return Data(obs, action, reward, obs, terminated, returns, np.full(3, 20), None, (np.nan, np.nan))


class SummaryWriter:
    def __init__(self, *args, **kwargs):
        self.add_histogram = self.close = lambda *args: None

    def add_scalar(self, name, value, num_updates):
        print(f"own logger: {num_updates} {name} {value:.3f}")


'''


@pytest.mark.parametrize("name", ["iql_red", "crr_red", "rvs_lds"])
def test_a_copier(name, tmp_path):
    """A file elsewhere, whose readers went in one block for one's own arrays, and TensorBoard for one's own logger."""
    text = (harness.ROOT / "algorithms" / f"{name}.py").read_text()
    readers = text[text.index("\n\n# D4RL's returns") : text.index("# Plumbing of all scripts")]
    text = re.sub("import h5py\n|import minari\n|from torch.utils.tensorboard .*\n", "", text.replace(readers, OWN))
    (tmp_path / "mine.py").write_text(text)
    flags = "--num-updates 40 --log-every 20 --batch-size 8 --hidden-sizes 4 --device cpu --eval-episodes 0".split()
    done = subprocess.run([sys.executable, "mine.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "60 transitions of 3 episodes" in done.stdout and "own logger: 40 loss/" in done.stdout
    assert (tmp_path / "runs" / "mine").exists()


if __name__ == "__main__":
    path = harness.ROOT / "README.md"
    path.write_text(with_sizes(path.read_text()))
