"""Chat templates: what they see, what they cannot do, and everything that can be wrong with them or the messages."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.errors import EnvironmentFault, InputRefused, UsageFault
from pipeline.runner.chat import MAX_CHARACTERS, ChatTemplate, read_template
from tests.pipeline.random_models import EOS, tokenizer

ASK = [{"role": "user", "content": " why? "}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "\u00e9 <b>&</b>"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "tool\n"},
]
# Two ways in which authors write them: one long line, and indented blocks that count on being trimmed.
HEADERS = (
    "{% for message in messages %}{{ (bos_token if loop.index0 == 0 else '') + '[' + message['role'] + ']\n' "
    "+ message['content'] | trim + eos_token }}{% endfor %}{{ '[assistant]\n' }}"
)
INDENTED = """\
{%- if messages[0].role != 'system' %}
    {{- '<system>none\\n' }}
{%- endif %}
{%- if tools %}
    {{- tools | tojson }}
{%- endif %}
{% set seen = namespace(users=0) %}
{%- for message in messages %}
    {% if message.role == 'user' %}
        {% set seen.users = seen.users + 1 %}
    {% endif %}
    {%- if message.content is not defined %}{% continue %}{% endif %}
    {{- '<' ~ message.role ~ '>' ~ message.content | tojson }}
    {% if seen.users > 1 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>' }}
{%- endif %}
"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("messages", [ASK, TURNS])
@pytest.mark.parametrize("text", [HEADERS, INDENTED])
def test_prompts_are_those_of_transformers(text, messages):
    made = ChatTemplate(text=text, tokens=TOKENS).render(messages)
    (theirs,), _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=True, **TOKENS)
    assert made == theirs
    assert "why?" in made or "Be brief." in made


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_content_is_carried_over_as_it_is(contents):
    template = ChatTemplate(text="{% for message in messages %}{{ message.content }}\x00{% endfor %}")
    made = template.render([{"role": "user", "content": content} for content in contents])
    assert made == "".join(f"{content}\x00" for content in contents)


@pytest.mark.parametrize("content", ["{{ 7 * 7 }}", "{% for x in y %}", "{{ messages.__class__ }}"])
def test_what_a_user_says_is_never_a_template(content):
    assert ChatTemplate(text="{{ messages[0].content }}").render([{"role": "user", "content": content}]) == content


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ (1).__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(messages) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%9999999999d' % 1 }}",
        "{% for i in range(10 ** 9) %}a{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}hello, hello {% endfor %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ absent.attribute }}",
        "{{ messages[0] + 1 }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ messages | no_such_filter }}",
    ],
)
def test_a_template_that_reaches_out_is_refused(text):
    with pytest.raises(InputRefused, match="chat template"):
        ChatTemplate(text=text).render(ASK)


def test_a_long_conversation_is_cut_off_before_it_fills_the_memory():
    text = "{% for i in range(64) %}{{ messages[0].content }}{% endfor %}"
    long = "a" * (MAX_CHARACTERS // 64)
    assert len(ChatTemplate(text=text).render([{"role": "user", "content": long}])) == MAX_CHARACTERS
    with pytest.raises(InputRefused, match="more than 1048576 characters"):
        ChatTemplate(text=text).render([{"role": "user", "content": f"{long}a"}])


def test_what_the_author_refuses_is_the_users_to_mend():
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    with pytest.raises(UsageFault, match="no system turn"):
        ChatTemplate(text=text).render(TURNS)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "no messages"),
        (["hello"], "message 1 is 'hello'"),
        ([{"role": "user"}], "expected an object with role and content"),
        ([*ASK, {"role": "user", "content": "a", "name": "b"}], "message 2"),
        ([{"role": "robot", "content": "a"}], "the role 'robot'"),
        ([{"role": "user", "content": None}], "the content None"),
    ],
)
def test_messages_that_are_none_are_refused(messages, why):
    with pytest.raises(UsageFault, match=why):
        ChatTemplate(text=HEADERS, tokens=TOKENS).render(messages)


def test_without_jinja2_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(EnvironmentFault, match=r"dllmc\[chat\]"):
        ChatTemplate(text="a").render(ASK)


class TestReading:
    def read(self, folder, content):
        path = folder / "tokenizer_config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_template(path, tokenizer())

    def test_special_tokens_get_their_text(self, tmp_path):
        template = self.read(tmp_path, {"chat_template": HEADERS, "special_ids": {"eos_token": EOS}})
        assert template == ChatTemplate(text=HEADERS, tokens={"eos_token": "<eos>"})

    def test_a_bundle_may_have_none(self, tmp_path):
        assert read_template(tmp_path / "absent.json", tokenizer()) is None
        assert self.read(tmp_path, {"chat_template": None, "special_ids": {"eos_token": EOS}}) is None

    @pytest.mark.parametrize(
        "content",
        [
            "{",
            "[" * 100_000,
            [],
            {"chat_template": 3},
            {"chat_template": "a", "special_ids": []},
            {"chat_template": "a", "special_ids": {"eos_token": 99}},
            {"chat_template": "a", "special_ids": {"eos_token": -1}},
            {"chat_template": "a", "special_ids": {"eos_token": 2**40}},
            {"chat_template": "a", "special_ids": {"eos_token": "<eos>"}},
            {"chat_template": "a", "special_ids": {"eos_token": True}},
        ],
        ids=lambda content: str(content)[:40],
    )
    def test_anything_else_is_refused(self, tmp_path, content):
        with pytest.raises(InputRefused, match="export"):
            self.read(tmp_path, content)
