"""Growing histories of an agent, in English, Chinese and code: seeded, so that they are the same every time."""

from __future__ import annotations

import random

__all__ = ["KINDS", "Message", "history"]

Message = dict[str, str]

#: Tokens of Qwen's tokenizer in a character, roughly: texts are sized by it.
TOKENS = {"English": 0.22, "Chinese": 0.68, "code": 0.3}
#: Tokens of one turn, at the least and at the most, and the part of it that is the assistant's.
TURN, ANSWER = (180, 340), (0.45, 0.7)

ENGLISH = {
    "who": "the parser|the scheduler|our cache|the retry policy|the upload form|this report|the billing job|the importer",
    "did": "rejects|delays|repeats|drops|logs|rewrites|validates|ignores",
    "what": "malformed rows|late events|empty responses|duplicate orders|stale sessions|long file names|partial uploads",
    "when": "after a restart|on Mondays|under load|when the disk is full|before the first login|in one run of {n}",
    "why": "because nobody checks the return value|since the limit was raised to {n}|as section {n} asks"
    "|although the tests said otherwise|which costs {n} milliseconds each time|until the queue holds {n} items",
}
ENGLISH_SAY = (
    "It seems that {who} {did} {what} {when}, {why}. ",
    "I would keep it as it is: {who} {did} {what}, {why}. ",
    "Next we should look at how {who} {did} {what} {when}. ",
    "My measurement number {n} shows that {who} {did} {what} {when}. ",
)
CHINESE = {
    "who": "解析器|调度程序|缓存模块|重试策略|上传表单|统计报告|计费任务|导入工具",
    "did": "拒绝了|推迟了|重复处理了|丢弃了|记录了|改写了|校验了|忽略了",
    "what": "格式错误的数据行|迟到的事件|空的响应|重复的订单|过期的会话|过长的文件名|不完整的上传",
    "when": "在服务重启之后|在高负载情况下|在磁盘写满的时候|在首次登录之前|大约每运行{n}次就有一次",
    "why": "因为没有人检查返回值|由于上限被提高到{n}|这符合需求文档第{n}节的要求|每次多花费{n}毫秒|直到队列里有{n}个元素",
}
CHINESE_SAY = (
    "{who}{when}{did}{what}，{why}。",
    "我建议保持现状：{who}{did}{what}，{why}。",
    "下一步我们需要确认{who}{when}为什么{did}{what}。",
    "第{n}次测量表明，{who}{when}{did}{what}。",
)
CODE = {
    "name": "rows|orders|events|sessions|uploads|entries|limits|records",
    "verb": "load|sort|merge|check|group|rotate|collect|schedule",
    "type": "dict[str, int]|list[str]|Optional[Path]|Iterator[Row]|tuple[int, ...]",
    "test": "len(item) > {n}|item.startswith('x{n}')|item.size <= limit|not item.done|item in seen",
}
CODE_SAY = (
    "def {verb}_{name}_{n}({name}: {type}, limit: int = {n}) -> {type}:\n    seen = set()\n    for item in {name}:\n"
    "        if {test}:\n            continue\n        seen.add(item)\n    return sorted(seen, key=lambda item: item.at)[:limit]\n\n",
    "class Set{n}:\n    def __init__(self, {name}: {type}) -> None:\n        self.{name} = {name}\n\n"
    "    def {verb}(self, item: object, limit: int) -> None:\n        if {test}:\n"
    '            raise ValueError(f"{{item!r}} is no part of {name}")\n        self.{name}.append(item)\n\n',
)
CODE_SEEN = (
    "tests/test_{name}.py::test_{verb}_{name}_{n} PASSED\n",
    "tests/test_{name}.py::test_{verb}_{name}_{n} FAILED\nE       AssertionError: assert {n} == len({name})\n",
    "2026-11-24 21:40:{n} | WARNING  | app.{name}:{verb}:{n} - {n} of the {name} were skipped\n",
)
#: What the assistant says, what it is told, the system message, the task.
KINDS: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...], str, str]] = {
    "English": (ENGLISH, ENGLISH_SAY, ENGLISH_SAY, "You are a careful engineer. Answer in plain sentences.",
                "Find out why the nightly import fails, step by step, and say what is to be done."),
    "Chinese": (CHINESE, CHINESE_SAY, CHINESE_SAY, "你是一名严谨的软件工程师，请用简洁的中文回答。",
                "请逐步查明夜间导入任务失败的原因，并说明应当怎样处理。"),
    "code": (CODE, CODE_SAY, CODE_SEEN, "You are a programmer. Answer with Python code only.",
             "Write the data pipeline of the project, function by function. You are shown the output of each run."),
}  # fmt: skip


def history(kind: str, turns: int, seed: int) -> list[Message]:
    """System message, task, and ``turns`` times an answer and what it led to."""
    words, said, seen, system, task = KINDS[kind]
    rng = random.Random(f"{seed}/{kind}")

    def text(tokens: float, templates: tuple[str, ...]) -> str:
        made = ""
        while len(made) * TOKENS[kind] < tokens:
            n = rng.randint(10, 59)
            picked = {name: rng.choice(listed.split("|")).format(n=n) for name, listed in words.items()}
            made += rng.choice(templates).format(n=n, **picked)
        return made.rstrip()

    messages = [{"role": "system", "content": system}, {"role": "user", "content": task}]
    for _ in range(turns):
        size, share = rng.uniform(*TURN), rng.uniform(*ANSWER)
        messages.append({"role": "assistant", "content": text(size * share, said)})
        messages.append({"role": "user", "content": text(size * (1 - share), seen)})
    return messages
