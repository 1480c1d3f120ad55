"""A process of its own for a learner's code, which may never end: see __main__.py.

    python -m tests.exercises.grade check masking

Exit status 0 where all is right, 1 where it is not, 2 for what else the user can put right.
"""

import sys
import traceback

from minitune.support.errors import UserError
from tests.exercises import checks, trials
from tests.exercises.table import EXERCISES, Exercise


def check(exercise: Exercise) -> int:
    """Compare what was written with the lesson; say what is wrong; the exit status."""
    if functions := load(exercise):
        seen, error = checks.observe(exercise, functions)
        if wrong := checks.verdict(exercise, seen):
            say(exercise, "not right yet", *wrong)
        elif error:
            say(exercise, "not right yet", *in_words(error, exercise))
        else:
            compared = "; ".join(words for words, _ in seen)
            say(exercise, "right", f"compared: {compared}")
            print(f"what it does in practice: python -m tests.exercises try {exercise.number}")
            return 0
        print(f"a hint: python -m tests.exercises hint {exercise.number}")
    return 1


def try_out(exercise: Exercise) -> int:
    """Something small, with what was written and with the lesson's own code; the exit status."""
    if functions := load(exercise):
        try:
            for line in trials.lines(exercise, functions):
                print(line, flush=True)
            return 0
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            say(exercise, "it does not run", *in_words(error, exercise))
    return 1


def load(exercise: Exercise) -> checks.Functions | None:
    """What a learner wrote; None where that cannot be, which is said."""
    try:
        return checks.written_functions(exercise)
    except checks.NotWritten as reason:
        say(exercise, str(reason))
    except (Exception, SystemExit) as error:
        say(exercise, "it does not run", *in_words(error, exercise))
    return None


def say(exercise: Exercise, verdict: str, *lines: str) -> None:
    """A line of heading, and more."""
    print(f"exercise {exercise.number}, {exercise.title}: {verdict}", *lines, sep="\n")


def in_words(error: BaseException, exercise: Exercise) -> list[str]:
    """What the learner's code raised, with the lines of that code alone."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(exercise.file)]
    what = "".join(traceback.format_exception_only(error)).rstrip()
    if isinstance(error, SystemExit):
        return ["the code ends the program"]
    if own or isinstance(error, SyntaxError):
        return ["the code raised:", *"".join(traceback.format_list(own)).splitlines(), what]
    return [f"the project cannot use it: {what.splitlines()[-1]}"]


if __name__ == "__main__":
    _, command, name = sys.argv
    (chosen,) = (exercise for exercise in EXERCISES if exercise.name == name)
    try:
        sys.exit({"check": check, "try": try_out}[command](chosen))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
