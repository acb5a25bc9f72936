"""Renderings and masks equal those of transformers; a hostile template is refused in a sentence."""

import time

import pytest
import tokenizers

from flora_jax.finetune.chat import Chat
from flora_jax.finetune.documents import Document
from flora_jax.finetune.examples import encode
from flora_jax.finetune.tokenizer import Tokenizer
from tests.finetune import folders

LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|head|>' ~ message['role'] ~ '<|/head|>\n\n' }}
    {{- message['content'] | trim ~ '<|turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}
"""
GEMMA = """{{ bos_token }}{% set start = 0 %}
{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\n' %}{% set start = 1 %}{% endif %}
{% for message in messages[start:] %}
{% set role = 'model' if message.role == 'assistant' else message.role %}
{{ '<start_of_turn>' + role + '\n' + (head if loop.first and head is defined else '') -}}
{{ message.content | trim + '<end_of_turn>\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' -}}{% endif %}"""
MISTRAL = """{{- bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Turns must go user, assistant, user: ' + message.role) }}
{%- elif message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
STRIPS = """{% for m in messages %}{% set c = m.content %}
{%- if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1] %}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
THINKS = folders.CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
EXTRAS = """{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m | tojson }}
{{- m.reasoning_content or '' }}{{ tools is none }}{{ strftime_now('%Y') }}{% endfor %}"""
TEMPLATES = {
    "chatml": folders.CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "marked": MARKED,
    "strips": STRIPS,
    "thinks": THINKS,
    "extras": EXTRAS,
}
CHAT = [
    {"role": "user", "content": " the cat <b>é</b> "},
    {"role": "assistant", "content": "<think>sat</think>a mat", "thinking": "hm"},
    {"role": "user", "content": "12 + 34\n"},
    {"role": "assistant", "content": "= 46 🙂"},
]
BACKEND = tokenizers.Tokenizer.from_str(folders.byte_level())


def chat(template):
    return Chat(Tokenizer(BACKEND, bos=0, eos=1, template=template))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = folders.chatml(tmp_path_factory.mktemp("chatml"))
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_text_is_that_of_transformers(theirs, name, prompt, turns):
    wanted = theirs.apply_chat_template(
        CHAT[:turns], chat_template=TEMPLATES[name], add_generation_prompt=prompt, tokenize=False
    )
    assert chat(TEMPLATES[name]).render(CHAT[:turns], prompt) == wanted


def test_the_mask_of_generation_blocks_is_that_of_transformers(theirs):
    wanted = theirs.apply_chat_template(
        CHAT, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = Tokenizer(BACKEND, bos=0, eos=1, template=MARKED)
    found = encode([Document("messages", CHAT, "here")], tokenizer)[0]
    assert found.tokens.tolist() == wanted["input_ids"]
    assert found.counts.astype(int).tolist() == wanted["assistant_masks"]
    assert 0 < sum(wanted["assistant_masks"]) < len(wanted["assistant_masks"])


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("chatml", ["<think>sat</think>a mat<|im_end|>\n", "= 46 🙂<|im_end|>\n"]),
        ("marked", ["<think>sat</think>a mat<|im_end|>", "= 46 🙂<|im_end|>"]),
        ("llama3", ["<think>sat</think>a mat<|turn|>", "= 46 🙂<|turn|>"]),
        ("gemma", ["<think>sat</think>a mat<end_of_turn>\n", "= 46 🙂<end_of_turn>\n"]),
        ("mistral", [" <think>sat</think>a mat<|end|>", " = 46 🙂<|end|>"]),
    ],
)
def test_what_the_assistant_says(name, wanted):
    found = chat(TEMPLATES[name]).answers(CHAT)
    assert [found.text[a:b] for a, b in found.spans] == wanted
    assert not found.last_alone


def test_a_template_that_rewrites_earlier_answers_leaves_the_last_alone():
    found = chat(STRIPS).answers(CHAT)
    assert [found.text[a:b] for a, b in found.spans] == ["= 46 🙂<|im_end|>\n"]
    assert found.last_alone


def test_a_header_that_promises_more_than_the_answer_has():
    found = chat(THINKS).answers(CHAT)
    assert [found.text[a:b] for a, b in found.spans] == ["= 46 🙂<|im_end|>\n"]
    found = chat(THINKS).answers([CHAT[0], {"role": "assistant", "content": "<think>\na</think>b"}])
    assert [found.text[a:b] for a, b in found.spans] == ["a</think>b<|im_end|>\n"]


def test_a_template_whose_beginning_depends_on_the_end():
    with pytest.raises(ValueError, match=r"f, line 3: the chat template writes what stands before"):
        chat("{{ messages | length }}" + folders.CHATML).answers(CHAT, "f, line 3")
    with pytest.raises(ValueError, match=r"f, line 3: the chat template marks nothing as the"):
        chat(folders.CHATML + "{% generation %}{% endgeneration %}").answers(CHAT, "f, line 3")


def test_a_template_that_raises():
    wanted = (
        "f, line 3: the chat template refuses it: Turns must go user, assistant, user: assistant"
    )
    with pytest.raises(ValueError, match=wanted):
        chat(MISTRAL).answers(CHAT[1:], "f, line 3")


def test_no_template():
    with pytest.raises(ValueError, match=r"no chat template, which messages need; put one into"):
        Chat(Tokenizer(BACKEND))


GROWS = "{%% set ns = namespace(x='x') %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ ns.x }}"
HOSTILE = [
    ("{{ ''.__class__.__mro__ }}", "is refused: access to attribute '__class__' of 'str'"),
    ("{{ cycler.__init__.__globals__ }}", "is refused: access to attribute '__init__'"),
    ("{{ messages.append(1) }}", "is refused: access to attribute 'append'"),
    ("{% for i in range(10**9) %}{% endfor %}", "failed: Range too big"),
    (
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "steps for one",
    ),
    ("{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}", "steps for one"),
    (
        "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "steps for",
    ),
    ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "a text of more than"),
    ("{{ 'x' * 10**10 }}", "a text of more than"),
    ("{{ ['x'] * 10**10 }}", "a text of more than"),
    ("{{ 2 ** 1000000000 }}", "is refused: it makes huge numbers"),
    (GROWS % "{% set ns.x = ns.x ~ ns.x %}", "a text of more than"),
    (GROWS % "{% set ns.x = ns.x + ns.x %}", "a text of more than"),
    (GROWS % "{% set ns.x = [ns.x, ns.x] %}", "steps for one"),
    (GROWS % "{% set ns.x = ns.x.replace('x', ns.x ~ 'xx') %}", "a text of more than"),
    (GROWS % "{% set ns.x = ns.x | replace('x', 'xx') %}", "a text of more than"),
    (GROWS % "{% set ns.x = 'xx'.join([ns.x, ns.x]) %}", "a text of more than"),
    (GROWS % "{% set ns.x = '%s%s' % (ns.x, ns.x) %}", "a text of more than"),
    (GROWS % "{% set ns.x = '{}{}'.format(ns.x, ns.x) %}", "a text of more than"),
    (GROWS % "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}", "a text of more than"),
    ("{{ 'x'.ljust(10**9) }}", "is refused: ljust is asked for more than 100 columns"),
    ("{{ 'x'.center(10**9) }}", "is refused: center is asked for more than 100 columns"),
    (GROWS % "{% set ns.x = ns.x.encode() + ns.x.encode() %}", "failed: "),
    (GROWS.replace("x='x'", "x='x'.encode()") % "{% set ns.x = ns.x + ns.x %}", "a text of more"),
    (GROWS % "{% set ns.x = ns.x.translate({120: 'xx'}) %}", "a text of more than"),
    ("{{ range(99999) | map('string') | join('x' * 9999) }}", "a text of more than"),
    ("{{ (['x'] * 9999) | map('replace', 'x', 'x' * 9999) | join }}", "a text of more than"),
    ("{{ ('\n' * 10**6) | indent(99) }}", "a text of more than"),
    ("{{ ('\t' * 10**6).expandtabs(99) }}", "a text of more than"),
    ("{{ 'x' | tojson(indent=10**9) }}", "is refused: indent is asked for more than 100 columns"),
    ("{{ '%999999999d' % 1 }}", "is refused: it formats to a width that is large or computed"),
    ("{{ '%*d' % (10**9, 1) }}", "is refused: it formats to a width that is large or computed"),
    ("{{ '{:{}}'.format(1, 10**9) }}", "is refused: it formats to a width that is large or"),
    ("{{ strftime_now('%999999999Y') }}", "is refused: it formats to a width that is large or"),
    ("{{ nothing.at.all }}", "failed: 'nothing' is undefined"),
    ("{{ 1 / 0 }}", "failed: division by zero"),
]


@pytest.mark.parametrize("template, said", HOSTILE)
def test_a_hostile_template(template, said):
    start = time.monotonic()
    with pytest.raises(ValueError, match="f, line 3: the chat template ") as caught:
        chat(template).render(CHAT, where="f, line 3")
    assert said in str(caught.value)
    # without the limits it would end in years, or take all memory
    assert time.monotonic() - start < 120


def test_what_chat_templates_have_no_use_for():
    with pytest.raises(ValueError, match="cannot be read: No filter named 'slice'"):
        chat("{{ messages | slice(10**9) }}")
    with pytest.raises(ValueError, match="failed: 'lipsum' is undefined"):
        chat("{{ lipsum() }}").render(CHAT)


def test_what_chat_templates_use():
    template = (
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length }}{{ m.role | upper | indent(2) }}"
        "{{ m.items() | list | length }}{% endfor %}{{ messages | map(attribute='role') | join(',') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ ', '.join(messages | map(attribute='role')) }}{{ '%s' | format('x') }}{{ [1, 2] | sum }}"
    )
    wanted = "1/2USER22/2ASSISTANT4user,assistant1user, assistantx3"
    assert chat(template).render(CHAT[:2]) == wanted


def test_a_template_with_an_unknown_tag():
    with pytest.raises(ValueError, match=r"the chat template cannot be read: .*'foo'"):
        chat("{% foo %}")
