"""Feeds readers of outside data with inputs that are almost valid, and lists what breaks them.

    python tests/fuzz.py --inputs 1000000 [--seed 0] [--target config]
    python tests/fuzz.py --only 12345 [--seed 0]          # one input again, with its traceback
    python tests/fuzz.py --atheris config --seconds 600   # coverage-guided (pip install atheris)

An input is named by seed and number. Broken means: an exception that is no PeftRankError, more than
5 seconds of processor time, more than 1 GiB of memory, a dead process, or a message that cannot be
printed. The exit code is 1 if anything broke.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

SECONDS = 5
MEMORY = 2**30
_STALLED = 90
_CHUNK = 50_000
_ROOT = Path(__file__).parent.parent / "peftrank"


def say(text):
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


class Slow(BaseException):
    """An input took too long. No Exception, so that no reader takes it for an error of its own."""


class Found(Exception):
    """An input broke a reader, though no exception says so."""


def pick(seed, number, only=None):
    """Returns the name of the target of an input, and its random generator."""
    from fuzz_targets import TARGETS

    rng = Random(f"{seed}/{number}")
    if only is not None:
        return only, rng
    return rng.choices(list(TARGETS), [target.share for target in TARGETS.values()])[0], rng


def feed(name, given, folder):
    """Returns whether the target took an input (True) or refused it; raises what broke."""
    from fuzz_targets import TARGETS

    from peftrank.errors import PeftRankError

    folder.mkdir(parents=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        TARGETS[name].read(given, folder)
    except PeftRankError as error:
        _check_refusal(error)
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(folder)
    return True


def _check_refusal(error):
    try:
        str(error).encode()
    except UnicodeEncodeError:
        raise Found(f"a message that cannot be printed: {ascii(str(error))[:200]}") from error
    cause = error
    while cause is not None:
        # pyarrow asks for what a damaged file says; it is refused without touching the memory.
        if isinstance(cause, MemoryError) and not type(cause).__module__.startswith("pyarrow"):
            raise Found("the memory ran out, and the error was taken for another") from error
        cause = cause.__cause__ or cause.__context__


def limited():
    """Loads what any input needs, and makes slow inputs raise Slow and large ones MemoryError."""
    from fuzz_targets import warm_up

    warm_up()
    signal.signal(signal.SIGPROF, _slow)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _slow(number, frame):
    raise Slow("it took too long")


def place_of(error):
    """Returns what kind of error it is and where it left this package: what makes two alike."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(_ROOT)]
    where = f"{Path(own[-1].filename).relative_to(_ROOT)}:{own[-1].lineno}" if own else "tests"
    return f"{type(error).__name__} at {where}"


def work(state, answers, options, first, last):
    """Feeds the inputs first to last - 1; a process of its own, as it may die."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=_quick_folder()) as home:
        os.environ["TMPDIR"] = home
        limited()
        counts, seconds = Counter(), Counter()
        for number in range(first, last):
            state[0] = number
            name, rng = pick(options.seed, number, options.target)
            start = time.process_time()
            given = _made(name, rng)
            try:
                counts[name, feed(name, given, Path(home, f"{number}"))] += 1
            except BaseException as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                shutil.rmtree(Path(home, f"{number}"), ignore_errors=True)
                counts[name, "broken"] += 1
                shown = "".join(traceback.format_exception(error, limit=-6))[-4000:]
                answers.put(("broken", number, name, place_of(error), shown))
            seconds[name] += time.process_time() - start
            if number % 1000 == 999 or number == last - 1:
                answers.put(("counts", dict(counts), dict(seconds)))
                counts.clear()
                seconds.clear()
        answers.put(("done",))
        answers.close()
        answers.join_thread()


def _made(name, rng):
    from fuzz_targets import TARGETS

    return TARGETS[name].make(rng)


def _quick_folder():
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


class Tally:
    """What happened so far."""

    def __init__(self):
        self.counts, self.seconds, self.broken = Counter(), Counter(), {}

    def take(self, answer):
        if answer[0] == "counts":
            self.counts.update(answer[1])
            self.seconds.update(answer[2])
        elif answer[0] == "broken":
            _, number, name, where, shown = answer
            known = self.broken.setdefault((name, where), [0, number, shown])
            known[0] += 1
            if known[0] == 1:
                say(f"\n{name}: {where} (input {number})\n{shown}")

    def lines(self):
        """Yields a line per target: inputs, taken, refused, broken, milliseconds each."""
        yield f"{'target':<16}{'inputs':>9}{'taken':>9}{'refused':>9}{'broken':>8}{'ms':>7}"
        for name in sorted({name for name, _ in self.counts}):
            taken, refused, broken = (self.counts[name, k] for k in (True, False, "broken"))
            total = taken + refused + broken
            each = 1000 * self.seconds[name] / total
            yield f"{name:<16}{total:>9}{taken:>9}{refused:>9}{broken:>8}{each:>7.2f}"
        yield f"{sum(self.counts.values())} inputs, {sum(self.seconds.values()):.0f} s of processor"


def run(options):
    """Feeds all inputs from processes that are started again when they die or stall."""
    context = multiprocessing.get_context("spawn")
    tally, number, last = Tally(), options.first, options.first + options.inputs
    shown = time.monotonic()
    while number < last:
        state, answers = context.Array("q", [number]), context.Queue()
        end = min(last, number + _CHUNK)
        process = context.Process(target=work, args=(state, answers, options, number, end))
        process.start()
        done, seen, since = False, number, time.monotonic()
        while not done:
            try:
                answer = answers.get(timeout=1)
            except Exception:  # queue.Empty, or a message cut short by a death
                if not process.is_alive():
                    break
            else:
                tally.take(answer)
                done = answer[0] == "done"
            if state[0] != seen:
                seen, since = state[0], time.monotonic()
            if time.monotonic() - since > _STALLED:
                process.kill()
                break
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                say(f"\ninput {seen}\n" + "\n".join(tally.lines()))
        process.join()
        number = end
        if not done:
            number = state[0] + 1
            name = pick(options.seed, state[0], options.target)[0]
            why = f"process died or stalled ({process.exitcode})"
            tally.take(("counts", {(name, "broken"): 1}, {}))
            tally.take(("broken", state[0], name, why, ""))
    return tally


def again(options):
    """Feeds one input in this process."""
    name, rng = pick(options.seed, options.only, options.target)
    given = _made(name, rng)
    say(f"{name} {given!r}"[:5000])
    limited()
    with tempfile.TemporaryDirectory(dir=_quick_folder()) as home:
        say("taken" if feed(name, given, Path(home, "x")) else "refused")


def guided(options):
    """Lets atheris make the inputs of one target; never returns. A later call goes on from them."""
    import atheris

    with atheris.instrument_imports(include=["peftrank", "yaml", "json"]):
        import fuzz_targets
    target = fuzz_targets.TARGETS[options.atheris]
    fuzz_targets.warm_up()
    signal.signal(signal.SIGPROF, _slow)
    quick = Path(_quick_folder() or tempfile.gettempdir(), f"peftrank-fuzz-{os.getpid()}")

    def one(data):
        feed(options.atheris, target.blob(data), quick)

    seeds = Path(tempfile.gettempdir(), f"peftrank-fuzz-{options.atheris}")
    seeds.mkdir(exist_ok=True)
    for number in range(200):
        found = _bytes_of(target.make(Random(f"seed/{number}")), options.atheris)
        if found is not None:
            (seeds / str(number)).write_bytes(found)
    arguments = [f"-max_total_time={options.seconds}", "-rss_limit_mb=3000", "-timeout=60"]
    atheris.Setup([sys.argv[0], *arguments, "-max_len=4096", str(seeds)], one)
    atheris.Fuzz()


def _bytes_of(given, name):
    """Returns the bytes that an input is mostly made of."""
    files = given[0] if isinstance(given, tuple) else given
    if isinstance(files, dict):
        file = {"adapter": "peftrank.json", "adapter_config": "adapter_config.json"}.get(name)
        found = files.get(file, next(iter(files.values())))
    else:
        found = given[1] if isinstance(given, tuple) else given[0].encode("utf-8", "replace")
    return found if isinstance(found, bytes) else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--target", help="this one alone")
    parser.add_argument("--only", type=int, help="this input alone, in this process")
    parser.add_argument("--atheris", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=300, help="of --atheris")
    parser.add_argument("--report", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    if options.only is not None:
        return again(options)
    if options.atheris is not None:
        return guided(options)
    start = time.monotonic()
    tally = run(options)
    say("\n" + "\n".join(tally.lines()) + f" in {time.monotonic() - start:.0f} s")
    for (name, where), (count, number, _) in tally.broken.items():
        say(f"BROKEN {name}: {where}, {count} times, first input {number}")
    if options.report is not None:
        broken = [[*key, *value[:2]] for key, value in tally.broken.items()]
        counts = [[*key, value] for key, value in tally.counts.items()]
        options.report.write_text(json.dumps({"counts": counts, "broken": broken}))
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
