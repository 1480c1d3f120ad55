"""Ten exercises: read for five minutes, close the file, write its lines yourself, have them checked.

python -m tests.exercises             the list, and a file to fill in for each
python -m tests.exercises check 2     is it right? and if not, what is wrong
python -m tests.exercises try 2       what it changes, beside the lesson's own code
python -m tests.exercises hint 2
python -m tests.exercises answer 2    the lesson's own lines
"""

import os
import subprocess
import sys

from minitune.support.errors import UserError
from tests.exercises.table import EXERCISES, FOLDER, Exercise

SECONDS = {"check": 60, "try": 600}  # that a learner's code may take
COMMANDS = ("check", "try", "hint", "answer")


def main(words: list[str]) -> int:
    """Do what the words of the command line say; the exit status."""
    if not words:
        show_list()
        return 0
    exercise = chosen(words)
    if words[0] == "hint":
        print(exercise.hint)
    elif words[0] == "answer":
        for lesson in exercise.lessons:
            print(*lesson.answer(), sep="\n")
    else:
        return run(words[0], exercise)
    return 0


def chosen(words: list[str]) -> Exercise:
    """The exercise that these words name; UserError where they are no command."""
    usage = f"python -m tests.exercises [{'|'.join(COMMANDS)} N]"
    if len(words) != 2 or words[0] not in COMMANDS:
        raise UserError(f"{' '.join(words)}: the commands are {usage}")
    numbers = {str(exercise.number): exercise for exercise in EXERCISES}
    if words[1] not in numbers:
        raise UserError(f"there is no exercise {words[1]}: they are 1 to {len(EXERCISES)}")
    return numbers[words[1]]


def show_list() -> None:
    """The exercises, in reading order; makes the files that are not there."""
    for exercise in EXERCISES:
        if not exercise.file.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            exercise.file.write_text(exercise.text())
    print(__doc__.splitlines()[0])
    for exercise in EXERCISES:
        bodies = " and ".join(lesson.name for lesson in exercise.lessons)
        print(f"{exercise.number:>2}  {exercise.title}")
        print(f"      read   {exercise.read}")
        print(f"      write  {bodies} in {exercise.file}")
    print("", *__doc__.splitlines()[2:], sep="\n")


def run(command: str, exercise: Exercise) -> int:
    """In a process of its own, which can be stopped; its exit status."""
    if not exercise.file.is_file():
        list_them = "python -m tests.exercises makes it"
        raise UserError(f"{exercise.file} is not there: {list_them}")
    process = [sys.executable, "-m", "tests.exercises.grade", command, exercise.name]
    try:
        return subprocess.run(process, timeout=SECONDS[command]).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {SECONDS[command]} seconds: is there a loop without an end?")
        return 1


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:  # an OSError: a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
