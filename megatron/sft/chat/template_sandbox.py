"""Tries a chat template, which is a program, once in a separate process with limits of time and memory.

transformers renders it in a sandbox that keeps it from Python, but not from `9 ** 9 ** 9` or from endless loops. Run as a
script this file is that process: the template on standard input, exit status 3 and a line if it exceeds a limit.
"""

import functools
import json
import resource
import subprocess
import sys

SECONDS = 10  # of processor time
MEMORY_BYTES = 1 << 30
TOO_MUCH = 3  # exit status
_WAIT_SECONDS = 120  # of wall clock, which a busy machine may need for the time above
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "<think>\nIt is Paris.\n</think>\n\nParis."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome."},
]


@functools.cache
def check_template(text: str) -> None:
    """Refuse, with a `UserError`, a template that takes more than SECONDS or MEMORY_BYTES for a short conversation."""
    from megatron.sft.runtime.errors import UserError  # here, as the separate process cannot import it

    try:
        # -I: nothing but what is installed is imported.
        trial = subprocess.run(
            [sys.executable, "-I", __file__, str(SECONDS)],
            input=text.encode("utf-8", "surrogatepass"),
            capture_output=True,
            timeout=_WAIT_SECONDS,
        )
        status, reason = trial.returncode, trial.stderr.decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        status, reason = TOO_MUCH, f"still running after {_WAIT_SECONDS} s"
    if status == TOO_MUCH or status < 0:
        reason = reason or f"more than {SECONDS} s"
        raise UserError(f"the chat template takes too much for a short conversation ({reason}): do not use it")


def _try(text: str) -> None:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: "2024-01-01")
    template = environment.from_string(text)
    for messages, prompt in ((MESSAGES, False), (MESSAGES[:2], True), (MESSAGES[1:3], False)):
        template.render(messages=messages, tools=None, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>")


def _main() -> int:
    seconds = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    text = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    try:
        _try(text)
    except (MemoryError, RecursionError, OverflowError) as error:
        print(str(error) or type(error).__name__, file=sys.stderr)
        return TOO_MUCH
    except Exception:
        return 0  # errors of the template are reported where it is used, with the record
    return 0


if __name__ == "__main__":
    sys.exit(_main())
