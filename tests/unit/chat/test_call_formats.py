"""What is trained of calls, written out: arguments in every spelling, and formats that print them parameter by parameter."""

import json
from typing import Any

import pytest

from megatron.sft.chat.conversations import Messages
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.runtime.errors import UserError
from tests.support.chat_material import trl_template
from tests.support.rendering import call, template_for, trained, turns
from tests.unit.chat.test_templates import tokenizer_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "Tide at a harbour",
            "parameters": {
                "type": "object",
                "properties": {"harbour": {"type": "string", "description": "Its name"}},
                "required": ["harbour"],
            },
        },
    }
]
HEAD = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{%- for t in tools %}{{ t | tojson }}{%- endfor %}{{ '<|im_end|>\\n' }}"
    "{%- endif %}{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ m.content or '' }}"
    "{%- for c in m.tool_calls or [] %}"
)
TAIL = (
    "{%- endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The words that the formats of these families put around each parameter.
QWEN3_CODER = (
    HEAD + "{{ '<tool_call>\\n<function=' + c.function.name + '>\\n' }}{%- for k, v in c.function.arguments | items %}"
    "{{ '<parameter=' + k + '>\\n' }}"
    "{{ v | tojson | safe if v is mapping or (v is sequence and v is not string) else v | string }}"
    "{{ '\\n</parameter>\\n' }}{%- endfor %}{{ '</function>\\n</tool_call>' }}" + TAIL
)
MINIMAX = (
    HEAD + "{{ '<minimax:tool_call>\\n<invoke name=\"' + c.function.name + '\">' }}{%- set args = c.function.arguments %}"
    "{%- for k, v in args.items() %}{{ '<parameter name=\"' + k + '\">' }}"
    "{{ v | tojson(ensure_ascii=False) if v is not string else v }}{{ '</parameter>' }}{%- endfor %}"
    "{{ '</invoke>\\n</minimax:tool_call>' }}" + TAIL
)
DEEPSEEK = (  # V3.2's kind, which says of every parameter whether it is a string
    HEAD + "{{ '<dsml:invoke name=\"' + c.function.name + '\">' }}{%- for k, v in c.function.arguments.items() %}"
    "{{ '<dsml:parameter name=\"' + k + '\" string=\"' + ('true' if v is string else 'false') + '\">' }}"
    "{{ v if v is string else v | tojson }}{{ '</dsml:parameter>' }}{%- endfor %}{{ '</dsml:invoke>' }}" + TAIL
)
KIMI = (  # prints the id, which holds the name, and arguments as they are
    HEAD + "{{ '<|tool_call_begin|>' + c.id + '<|tool_call_argument_begin|>' }}"
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
    "{{ '<|tool_call_end|>' }}" + TAIL
)
MISTRAL = (
    HEAD + "{{ '[TOOL_CALLS]' }}{%- if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{%- endif %}"
    "{%- set out = c.function | tojson %}{{ '[' + out[:-1] + ', \"id\": \"' + c.id + '\"}]' }}" + TAIL
)
PYTHONIC = (
    HEAD + "{{ '[' if loop.first else ', ' }}{{ c.function.name + '(' }}{%- for k, v in c.function.arguments | items %}"
    "{{ k + '=' + ('\"' + v + '\"' if v is string else v | string) }}{{ '' if loop.last else ', ' }}{%- endfor %}{{ ')' }}"
    "{{ ']' if loop.last else '' }}" + TAIL
)
SORTED = (
    HEAD + "{{ c.function.name + '{' }}{%- for k, v in c.function.arguments | dictsort %}{{ k + ':' }}{{ v | tojson }}"
    "{{ ',' if not loop.last else '' }}{%- endfor %}{{ '}' }}" + TAIL
)
INDENTED = HEAD + "{{ c.function.name + ' ' }}{{ c.function.arguments | tojson(indent=2, ensure_ascii=True) }}" + TAIL

ARGUMENTS = {"harbour": 'Brest "été" <x>', "days": 2, "when": {"from": ["now", 1]}, "sure": True, "note": None, "all": []}
FORMATS: dict[str, tuple[str, str]] = {
    "qwen3-coder": (
        QWEN3_CODER,
        '<tool_call>\n<function=tide>\n<parameter=harbour>\nBrest "été" <x>\n</parameter>\n<parameter=days>\n2\n</parameter>\n'
        '<parameter=when>\n{"from": ["now", 1]}\n</parameter>\n<parameter=sure>\nTrue\n</parameter>\n<parameter=note>\nNone\n'
        "</parameter>\n<parameter=all>\n[]\n</parameter>\n</function>\n</tool_call>",
    ),
    "minimax": (
        MINIMAX,
        '<minimax:tool_call>\n<invoke name="tide"><parameter name="harbour">Brest "été" <x></parameter><parameter name="days">2'
        '</parameter><parameter name="when">{"from": ["now", 1]}</parameter><parameter name="sure">true</parameter>'
        '<parameter name="note">null</parameter><parameter name="all">[]</parameter></invoke>\n</minimax:tool_call>',
    ),
    "deepseek": (
        DEEPSEEK,
        '<dsml:invoke name="tide"><dsml:parameter name="harbour" string="true">Brest "été" <x></dsml:parameter>'
        '<dsml:parameter name="days" string="false">2</dsml:parameter><dsml:parameter name="when" string="false">'
        '{"from": ["now", 1]}</dsml:parameter><dsml:parameter name="sure" string="false">true</dsml:parameter>'
        '<dsml:parameter name="note" string="false">null</dsml:parameter><dsml:parameter name="all" string="false">[]'
        "</dsml:parameter></dsml:invoke>",
    ),
    "kimi": (
        KIMI,
        '<|tool_call_begin|>functions.tide:0<|tool_call_argument_begin|>{"harbour": "Brest \\"été\\" <x>", "days": 2, '
        '"when": {"from": ["now", 1]}, "sure": true, "note": null, "all": []}<|tool_call_end|>',
    ),
    "pythonic": (
        PYTHONIC,
        "[tide(harbour=\"Brest \"été\" <x>\", days=2, when={'from': ['now', 1]}, sure=True, note=None, all=[])]",
    ),
    "sorted": (SORTED, 'tide{all:[],days:2,harbour:"Brest \\"été\\" <x>",note:null,sure:true,when:{"from": ["now", 1]}}'),
    "indented": (INDENTED, "tide " + json.dumps(ARGUMENTS, indent=2)),
}


def conversation(arguments: Any, text: str = "", id: str = "functions.tide:0") -> Messages:
    answer = {"role": "assistant", "content": text, "tool_calls": [call("tide", arguments, id)]}
    result = {"role": "tool", "content": "rising", "tool_call_id": id}
    return [{"role": "user", "content": "Tide?"}, answer, result, {"role": "assistant", "content": "It rises."}]


@pytest.mark.parametrize("as_text", [False, True], ids=["object", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_trained_in_the_format_of_the_family(name: str, as_text: bool) -> None:
    text, expected = FORMATS[name]
    arguments = json.dumps(ARGUMENTS, ensure_ascii=False) if as_text else ARGUMENTS
    for said in ("", "I look."):
        found = trained(template_for(text), conversation(arguments, said), TOOLS)
        assert found == [said + expected + "<|im_end|>", "It rises.<|im_end|>"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_without_arguments_and_one_with_several_follow_each_other(name: str) -> None:
    template = template_for(FORMATS[name][0])
    messages = conversation({})
    messages[1]["tool_calls"].append(call("tide", {"harbour": "Nantes", "days": 3}, "functions.tide:1"))
    (first, last) = trained(template, messages, TOOLS)
    assert last == "It rises.<|im_end|>"
    assert "Nantes" in first
    assert first.count("tide") >= 2


def test_mistrals_call_has_its_id() -> None:
    expected = '[TOOL_CALLS][{"name": "tide", "arguments": {"harbour": "Brest"}, "id": "abcdefghi"}]<|im_end|>'
    found = trained(template_for(MISTRAL), conversation({"harbour": "Brest"}, id="abcdefghi"), TOOLS)
    assert found == [expected, "It rises.<|im_end|>"]
    with pytest.raises(UserError, match="ids have 9 characters"):
        trained(template_for(MISTRAL), conversation({"harbour": "Brest"}, id="short"), TOOLS)


def test_a_name_that_the_id_does_not_hold_is_dropped_by_kimi() -> None:
    with pytest.raises(UserError, match=r"turn 1 \('assistant'\)"):
        trained(template_for(KIMI), conversation({"harbour": "Brest"}, id="call_1"), TOOLS)


CODER_CALL = "<tool_call>\n<function=tide>\n<parameter=harbour>\nBrest\n</parameter>\n</function>\n</tool_call>"
PUBLISHED = {
    "qwen3_5_think": CODER_CALL + "<|im_end|>",
    "nemotron_3_nano": CODER_CALL + "\n<|im_end|>",
    "glm4moe": "<tool_call>tide\n<arg_key>harbour</arg_key>\n<arg_value>Brest</arg_value>\n</tool_call><|observation|>",
    "lfm2_2_5": "<|tool_call_start|>[tide(harbour='Brest')]<|tool_call_end|><|im_end|>\n",
    "gptoss": ' to=functions.tide<|channel|>commentary json<|message|>{"harbour": "Brest"}<|call|>',
    "llama3_2": '{"name": "tide", "parameters": {"harbour": "Brest"}}<|eot_id|>',
    "qwen2_5": '<tool_call>\n{"name": "tide", "arguments": {"harbour": "Brest"}}\n</tool_call><|im_end|>',
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_train_their_calls(name: str) -> None:
    for arguments in ({"harbour": "Brest"}, '{"harbour": "Brest"}'):
        (first, *_) = trained(template_for(trl_template(name)), conversation(arguments), TOOLS)
        assert first.endswith(PUBLISHED[name])


def test_glms_last_answer_ends_as_every_other() -> None:
    found = trained(template_for(trl_template("glm4moe")), turns("Sky?", "Blue.", "Grass?", "Green."))
    assert found == ["\n<think></think>\nBlue.<|user|>", "\n<think></think>\nGreen.<|user|>"]


SPELLINGS = {
    "compact": '{"harbour":"Brest"}',
    "indented": '{\n  "harbour": "Brest"\n}',
    "escaped": '{"harbour": "Br\\u00e9st"}',
    "slash": '{"harbour": "x\\/y"}',
    "float": '{"days": 1e3}',
    "big": '{"days": 123456789012345678901234567890}',
    "spaces": ' {"harbour" : "Brest"} ',
    "nested": '{"a":{"b":[1,{"c":"d"}]}}',
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_arguments_as_text_are_printed_as_the_template_prints_them(name: str) -> None:
    """Qwen3's template prints text as it is, Llama's through tojson, which needs an object."""
    text = SPELLINGS[name]
    as_it_is = trained(ChatTemplate(tokenizer_of("qwen3")), conversation(text), TOOLS)
    assert as_it_is[0] == f'<tool_call>\n{{"name": "tide", "arguments": {text}}}\n</tool_call><|im_end|>'
    again = json.dumps(json.loads(text), ensure_ascii=False)
    llama = template_for(trl_template("llama3_2"))
    assert trained(llama, conversation(text), TOOLS)[0] == f'{{"name": "tide", "parameters": {again}}}<|eot_id|>'
    coder = trained(template_for(QWEN3_CODER), conversation(text), TOOLS)[0]
    assert all(f"<parameter={name}>\n" in coder for name in json.loads(text))


def test_a_name_twice_in_the_text_of_arguments_is_refused_where_one_would_be_lost() -> None:
    messages = conversation('{"harbour": "Brest", "harbour": "Nantes"}')
    with pytest.raises(UserError, match="'harbour' twice"):
        trained(template_for(trl_template("llama3_2")), messages, TOOLS)


def test_a_template_that_drops_a_value_is_refused() -> None:
    drops = QWEN3_CODER.replace("| items %}", "| items if v is string %}")
    assert trained(template_for(drops), conversation({"harbour": "Brest"}), TOOLS)
    with pytest.raises(UserError, match=r"turn 1 \('assistant'\)"):
        trained(template_for(drops), conversation({"harbour": "Brest", "days": 2}), TOOLS)


def test_the_place_of_every_text_is_proven_whatever_it_says() -> None:
    """A value with the template's own words in it does not move the mask."""
    words = "x\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
    (first, _) = trained(template_for(QWEN3_CODER), conversation({"harbour": words, "days": 2}), TOOLS)
    assert f"<parameter=harbour>\n{words}\n</parameter>\n<parameter=days>\n2\n" in first
