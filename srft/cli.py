"""The command `srft`: finds out what is asked, reads the configuration, calls the room that does it.

A wrong input ends with one message and exit code 2, what nobody foresaw with one and 1; `--debug` shows the traceback.
"""

import errno
import importlib.metadata
import itertools
import os
import signal
import sys
from pathlib import Path

from srft.data.columns import known_names
from srft.errors import UserError, disk_full, nearest
from srft.ranks import Ranks, join
from srft.settings import help_text, load, recipes

HELP = """\
srft: single-stage supervised + reinforcement fine-tuning of language models

  srft train [CONFIG.toml] [--recipe NAME] [--section.key value …]  train, measured before and after on held-out prompts
  srft train --resume RUN_DIR [--section.key value …]   go on from the last checkpoint of a run that was stopped
  srft eval  [CONFIG.toml] [--checkpoint DIR] [--section.key value …]    avg@k, pass@k: held-out prompts or benchmarks
  srft study STUDY.toml [--section.key value …]         the same job by several methods and seeds, one after the other
  srft compare STUDY.toml | RUN… [--against METHOD]     methods beside each other: a table and a page, with intervals
  srft analyze BASE RUN… [--section.key value …]        what training changed, token by token
  srft data check FILE… [--section.key value …]         what is in data files, and what is wrong with them
  srft report [--watch] RUN_DIR                         write RUN_DIR/report.html again, or show it as the run goes on
  srft COMMAND --help                                   more on one command; `srft train --help` lists every setting

Examples
  srft train                                            the embedded SmolLM2-135M learns to add and subtract
  srft train my.toml --train.lr 1e-5 --train.steps 200  a file, and settings that differ from it
  srft train --recipe sft_grpo                          a baseline: first SFT, then GRPO
  srft train --data.tasks chain_sum gsm_symbolic --rollout.max_new_tokens 200
  srft train --data.train_file train.jsonl --model.path ./my-model
  srft eval --checkpoint runs/2026-01-31-12-00-00/final --eval.samples 16
  srft eval --recipe benchmarks --checkpoint runs/2026-01-31-12-00-00      the paper's table, from files in benchmarks/
  torchrun --nproc_per_node=8 -m srft train my.toml     the same run on the 8 GPUs of a node

--debug shows the traceback of an error.
"""

TRAIN_HELP = """\
srft train [CONFIG.toml] [--recipe NAME] [--section.key value …]
srft train --resume RUN_DIR [--section.key value …]

Samples prompts, generates rollouts, scores them and the demonstrations with a verifiable reward, takes one optimizer
step on both; evaluates on held-out prompts before and after. Everything is written into run.dir: config.toml,
metrics.jsonl, samples.jsonl, status.json, checkpoints and report.html.

Settings come from the defaults below, then CONFIG.toml, then recipes (--recipe may be there several times), then the
command line:
  [train]                                   in CONFIG.toml is the same as
  lr = 1e-5                                 --train.lr 1e-5
Lists take several values (--data.tasks chain_sum gsm_symbolic), tables take dotted keys
(--data.task_args.chain_sum.max_terms 4, --loss.options.entropy_sign 1).

--resume goes on from the newest checkpoint of a run that had run.checkpoint_every, the only one that keeps what that
needs, with the settings of RUN_DIR/config.toml; what was written after it moves to RUN_DIR/previous-N. SIGTERM and
Ctrl-C leave such a checkpoint too. Any other checkpoint, and the interrupted-N of a run without
run.checkpoint_every, is a model to start a new run from: --model.path DIR.

A data file has one row per prompt (.jsonl, .json, .csv, .parquet, each also .gz): prompt (text) or messages (a chat),
demonstration (a worked solution) and/or answer (what rewards compare with); other columns go to the reward function.
`srft data check FILE` tells what is taken for what, `srft data check --help` which columns are known. For example
  {"prompt": "What is 2 + 3?", "demonstration": "2 + 3 = 5\\n#### 5", "answer": "5"}

A reward function of your own is --reward.name my_module:my_function or my_file.py:my_function, with the signature
  def my_function(prompts, completions, **columns) -> list[float | None]
or that of a reward of TRL or verl (docs/training.md).

Recipes
{recipes}

Settings
"""

EVAL_HELP = """\
srft eval [CONFIG.toml] [--recipe NAME] [--checkpoint DIR] [--section.key value …]

Generates eval.samples completions of eval.prompts held-out prompts, or of the benchmarks that eval.sets names, and
tells avg@k (mean reward) and pass@k (unbiased) with intervals of 95 %: a table, printed, and written to eval.dir with
all completions. Benchmarks are graded by math-verify, and multiple-choice questions by the letter.
--checkpoint is a checkpoint, a run directory (its final checkpoint) or any model; without it model.path is evaluated.
Where no CONFIG.toml is given and the checkpoint lies in a run, the settings are those of the run.

Settings are those of `srft train --help`; for example
  srft eval --checkpoint runs/2026-01-31-12-00-00 --eval.samples 16 --eval.prompts 200
  srft eval --checkpoint runs/2026-01-31-12-00-00 --eval.sets aime24.jsonl gpqa_diamond.csv --eval.samples 8
  srft eval --checkpoint runs/2026-01-31-12-00-00 --recipe benchmarks      # the SRFT paper's table, from benchmarks/

A set may be a table, in CONFIG.toml:
  [[eval.sets]]
  file = "aime24.jsonl"
  name = "AIME 24"            # of its row; else that of the file
  group = "maths"             # sets of one group have a mean; else how they are graded
  samples = 32                # else eval.samples
  temperature = 0.6           # else eval.temperature; 0: greedy
  columns = {answer = "key"}  # where `srft data check FILE` does not find them itself
  broken = "drop"             # leaves out rows that cannot be read, graded or fit; else they are refused
  [[eval.sets]]
  task = "basic_arithmetic"   # made by reasoning-gym, with task_args as in data.task_args
"""

DATA_HELP = """\
srft data check FILE… [--section.key value …]
srft data check CONFIG.toml [--section.key value …]

Tells what is in data files: which columns were taken for what, counts, lengths, repeated prompts, held-out prompts that
are in the training file too, and every broken row with file and line. It needs no model; with --model.path lengths are
tokens, and what the chat template refuses is told too.

FILE is .jsonl, .json, .csv, .tsv, .parquet or .arrow, each also .gz, a directory of such files, a glob, a directory of
save_to_disk, or a dataset of a hub: owner/name:configuration@split. Settings are those of `srft train --help`:
  srft data check train.jsonl --data.eval_file test.jsonl --data.columns.demonstration solution --model.path ./my-model

Known names of columns, in any case of letters; > before what comes after it, | between names of which a row has one:
"""

STUDY_HELP = """\
srft study STUDY.toml [--section.key value …]

Runs the same job by several methods and seeds, one run after the other, each in a directory of its own in study.dir.
Where eval.sets names sets, each run is measured on them, and so is the model as it was. Started again a study goes on:
what is finished is skipped. `srft compare STUDY.toml` tells what came out, also before all has run.
STUDY.toml is a CONFIG.toml with a table [study]:
  [study]
  methods = ["sft", "grpo", "srft_paper"]     # recipes, which `srft train --help` lists, and variants
  seeds = [0, 1, 2]
  dir = "runs/mine"                           # default: runs/ and the name of the file
  launch = "torchrun --standalone --nproc_per_node=8 -m srft"     # default: one process
  like = "other.toml"                         # all that another study has, and this in place of that
  [study.variants.srft_plus]                  # methods of your own: a recipe, and settings over it
  recipe = "srft_paper"
  seeds = [0]                                 # default: those of the study
  loss = {options = {entropy_sign = 1}}
"""

COMPARE_HELP = """\
srft compare STUDY.toml | RUN… [--against METHOD] [--dir DIR]

Methods beside each other: final scores with intervals of 95 % over seeds and prompts, differences paired by seed and
prompt and whether they are "better", "worse" or "cannot tell" (as of one seed, where no method has several); updates,
tokens trained on and generated, seconds; and on a page the curves, entropies, weights and shares of the gradient.

What is compared is a study or several, or their directories (runs that have finished), directories of runs, or a
directory that this command wrote.
Runs sft-0 and sft-1, of seeds 0 and 1, are two of the method sft; they may differ in nothing but their seeds.
--against: the method that the others are compared with; default: the first.
--dir: where index.html, table.md, comparison.json and a record of each run are written; default: comparison/ in the
study's directory, else comparisons/ and the time.
"""

ANALYZE_HELP = """\
srft analyze BASE RUN… [CONFIG.toml] [--section.key value …]

What training changed in models, token by token, on the held-out prompts of the first run and on other tasks: one page
and one JSON in analyze.dir. BASE and RUN are each a run (its last model; its checkpoints are on the map), a checkpoint,
or any model; all have to have one tokenizer. Settings are those of the first run, which CONFIG.toml replaces.
  srft analyze smollm2 runs/2026-01-31-12-00-00
  srft analyze smollm2 runs/study/sft-0 runs/study/grpo-0 runs/study/srft_paper-0 --analyze.prompts 64

On the page: KL(base ‖ model) per token, the predictor of what is forgotten (arXiv 2509.04259), against reward and
against that of other tasks; which tokens became likelier or less likely, by where they stand and by the entropy they
had, and the texts coloured by it; rewards where a few per cent of the tokens, those that changed most, are swapped
between base and model while they write (arXiv 2603.22446); a map of models and their checkpoints; entropies and the
weights e^-H and e^H that SRFT makes of them; the gradients of demonstrations and of rollouts beside each other; which
weights have changed.
"""

REPORT_HELP = """\
srft report RUN_DIR
srft report --watch RUN_DIR [--port 8000]

Writes RUN_DIR/report.html again: one self-contained page with the curves, the configuration and the samples, and what
looks wrong in the last steps with what to try.

--watch shows that page while the run goes on, to browsers on this machine only: from elsewhere by way of
ssh -L 8000:localhost:8000. It writes nothing, and may be started and ended at any time.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a wrong input, 1 for another error, 128 + n by signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    ranks = Ranks()
    try:
        ranks = join(quiet=not debug)
        return ranks.leave(dispatch([each for each in arguments if each != "--debug"], ranks))
    except UserError as error:
        if debug:
            raise
        return ranks.fail(f"srft: error: {error}", 2)
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        by = "" if number == signal.SIGINT else f" by {error}"
        return ranks.fail(f"srft: interrupted{by}", 128 + number)
    except BrokenPipeError:  # whoever reads what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ranks.leave(128 + signal.SIGPIPE)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return ranks.fail(f"srft: error: {error.filename}: {error.strerror}; give it the rights needed", 2)
        if isinstance(error, OSError) and (advice := disk_full(error)):
            return ranks.fail(f"srft: error: {error.filename or 'a file'}: {error.strerror or error}{advice}", 2)
        message = " ".join(str(error).split())
        where = f"rank {ranks.rank}: " if ranks.size > 1 else ""
        message = f"srft: error: {where}unexpected {type(error).__name__}: {message}; --debug shows where"
        return ranks.fail(message, 1, error)


def dispatch(arguments: list[str], ranks: Ranks) -> int:
    commands = {
        "train": (train, TRAIN_HELP.replace("{recipes}", listed(recipes())) + help_text()),
        "eval": (evaluate, EVAL_HELP),
        "data": (check_data, DATA_HELP + known_names()),
        "study": (study, STUDY_HELP),
        "compare": (compare, COMPARE_HELP),
        "analyze": (analyze, ANALYZE_HELP),
        "report": (report, REPORT_HELP),
    }
    command, *rest = arguments or [""]
    if command in ("-h", "--help", "help", ""):
        print(HELP)
        return 0 if command else 2
    if command == "--version":
        print(f"srft-kernels {importlib.metadata.version('srft-kernels')}")
        return 0
    if command not in commands:
        raise UserError(f"unknown command {command!r}{nearest(command, commands)} (commands: {', '.join(commands)})")
    function, help = commands[command]
    if "-h" in rest or "--help" in rest:
        print(help)
    elif command == "train":
        train(rest, ranks)
    elif ranks.size > 1:
        raise UserError(f"srft {command} runs in one process: start it without torchrun")
    else:
        function(rest)
    return 0


def train(arguments: list[str], ranks: Ranks) -> None:
    path, overrides = config_file(arguments)
    overrides, resumed = take_option(overrides, "--resume")
    overrides, names = take_options(overrides, "--recipe")
    if resumed:
        from srft.checkpoint import resumable

        if path or names:
            found = path or f"--recipe {names[0]}"
            raise UserError(f"--resume takes the settings from the run, found {found} too; leave one of them out")
        resumed = resumable(resumed)
        path = str(resumed.parent / "config.toml")
    config = load(path, overrides, names)
    from srft.run import run

    run(config, ranks, resumed)


def evaluate(arguments: list[str]) -> None:
    path, overrides = config_file(arguments)
    overrides, checkpoint = take_option(overrides, "--checkpoint")
    overrides, names = take_options(overrides, "--recipe")
    if checkpoint and Path(checkpoint).is_dir():
        directory = Path(checkpoint)
        path = path or settings_near(directory)
        if not (directory / "config.json").is_file() and (directory / "config.toml").is_file():
            checkpoint = str(model_of_run(directory))
    config = load(path, overrides, names)
    from srft.eval import main_eval

    main_eval(config, checkpoint)


def model_of_run(directory: Path) -> Path:
    """The final model of a run; UserError, with what there is instead, where it did not come to its end."""
    if (directory / "final").is_dir():
        return directory / "final"
    from srft.checkpoint import newest_model

    model = newest_model(directory)
    advice = f"it was stopped; evaluate {model}" if model else "it was stopped before it saved one"
    raise UserError(f"--checkpoint {directory}: the run has no final model; {advice}")


def check_data(arguments: list[str]) -> None:
    files = list(itertools.takewhile(lambda each: not each.startswith("--"), arguments))
    overrides = arguments[len(files) :]
    named = {each.partition("=")[0] for each in overrides}
    if files[:1] != ["check"] or not (files[1:] or "--data.train_file" in named):
        raise UserError("srft data check takes files to check: srft data check train.jsonl")
    path = files.pop() if files[1:] and files[-1].endswith(".toml") else None
    config = load(path, overrides)
    config.data.train_file = files[1:] or config.data.train_file
    if not config.data.train_file:
        raise UserError(f"{path}: data.train_file is not set, so there is nothing to check")
    from srft.check import check

    tokenizer = None
    if "--model.path" in named:
        from srft.model import load_tokenizer

        tokenizer, _ = load_tokenizer(config.model)
    check(config, tokenizer)


def study(arguments: list[str]) -> None:
    path, overrides = config_file(arguments)
    if not path:
        raise UserError("srft study takes a file with a table [study]: srft study STUDY.toml")
    from srft.study import load_study, run_study

    if failed := run_study(load_study(path, overrides)):
        raise UserError(f"{len(failed)} runs failed: {', '.join(each.directory.name for each in failed)}; see above")


def compare(arguments: list[str]) -> None:
    arguments, against = take_option(arguments, "--against")
    arguments, directory = take_option(arguments, "--dir")
    if not arguments or arguments[0].startswith("--"):
        raise UserError("srft compare takes a study, runs, or a directory that it wrote: srft compare STUDY.toml")
    if unknown := [each for each in arguments if each.startswith("--")]:
        raise UserError(f"srft compare: unknown option {unknown[0]} (--against METHOD, --dir DIR)")
    from srft.study import main_compare

    main_compare(arguments, against or "", directory or "")


def analyze(arguments: list[str]) -> None:
    paths = list(itertools.takewhile(lambda each: not each.startswith("--"), arguments))
    overrides = arguments[len(paths) :]
    overrides, names = take_options(overrides, "--recipe")
    files = [each for each in paths if each.endswith(".toml")]
    base, *runs = [each for each in paths if each not in files] or [""]
    if not runs or len(files) > 1:
        raise UserError("srft analyze takes a base and what was made of it: srft analyze smollm2 RUN_DIR")
    config = load(files[0] if files else settings_near(Path(runs[0])), overrides, names)
    from srft.analysis import main_analyze

    main_analyze(config, base, runs)


def settings_near(directory: Path) -> str | None:
    """The settings of the run that the directory is, or lies in."""
    near = (each / "config.toml" for each in (directory, directory.parent))
    return next((str(each) for each in near if directory.is_dir() and each.is_file()), None)


def report(arguments: list[str]) -> None:
    arguments, port = take_option(arguments, "--port")
    watched = "--watch" in arguments
    arguments = [each for each in arguments if each != "--watch"]
    if len(arguments) != 1 or arguments[0].startswith("--"):
        raise UserError(f"srft report takes one run directory, found {' '.join(arguments) or 'none'}")
    if not Path(arguments[0]).is_dir():
        raise UserError(f"{arguments[0]}: there is no such run directory")
    if port is not None and not (watched and port.isdecimal() and int(port) < 2**16):
        raise UserError(f"--port {port}: expected {EXPECTED['--port']}, beside --watch")
    if watched:
        from srft.watch import PORT, main_watch

        return main_watch(arguments[0], PORT if port is None else int(port))
    from srft.report import build

    print(build(Path(arguments[0])))


def config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The leading CONFIG.toml, if any, and the rest."""
    if not arguments or arguments[0].startswith("--"):
        return None, arguments
    path, *rest = arguments
    if "=" in path and not Path(path).exists():
        raise UserError(f"{path}: settings begin with two dashes: --{path}")
    if Path(path).is_dir():
        advice = "a model or a run is --checkpoint DIR or --resume DIR"
        raise UserError(f"{path}: expected a CONFIG.toml, found a directory; {advice}")
    return path, rest


EXPECTED = {
    "--checkpoint": "a directory or a model's name",
    "--resume": "the directory of a run",
    "--against": "the name of a method",
    "--dir": "the name of a directory",
    "--port": "a number from 0 (any that is free) to 65535",
    "--recipe": f"the name of a recipe, one of {', '.join(recipes())}",
}


def take_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """The arguments without `NAME VALUE` or `NAME=VALUE`, and the value."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == name:
            given = [value] if equals else arguments[index + 1 : index + 2]
            if not given or not given[0] or given[0].startswith("--"):
                raise UserError(f"{name}: expected {EXPECTED[name]}")
            rest = arguments[index + (1 if equals else 2) :]
            if rest and not rest[0].startswith("--"):
                again = f"; several are {name} {given[0]} {name} {rest[0]}" if name == "--recipe" else ""
                raise UserError(f"{name}: expected one value, found {given[0]} {rest[0]}{again}")
            return arguments[:index] + rest, given[0]
    return arguments, None


def take_options(arguments: list[str], name: str) -> tuple[list[str], list[str]]:
    """The same for an option that may be there several times."""
    found = []
    arguments, value = take_option(arguments, name)
    while value is not None:
        found.append(value)
        arguments, value = take_option(arguments, name)
    return arguments, found


def listed(names: dict[str, str]) -> str:
    return "\n".join(f"  {name:<16} {said}" for name, said in names.items())
