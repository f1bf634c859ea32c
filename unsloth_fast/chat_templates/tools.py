"""The chat formats that can call tools: Llama 3.1 and later, Qwen 2.5 and 3, as their makers' templates write them."""

_ASK_JSON = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
    "Do not use variables.\\n\\n"
).replace(". Do", ".Do")  # the published template has no space there

# Meta's template, without its built-in tools: the tools are described in the first user's message, or in the system's.
_LLAMA = """{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
DATE
{%- if not tools %}
    {%- set tools = none %}
{%- endif %}
{%- set system = '' %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none and not tools_in_user_message %}
    {{- 'You have access to the following functions. ' }}
    {{- 'To call a function, please respond with JSON for a function call.' }}
    {{- 'ASK_JSON' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- if tools is not none and tools_in_user_message %}
    {%- if not messages %}
        {{- raise_exception('messages: got none with tools; allowed: at least one of the user') }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- 'Given the following functions, please respond with a JSON for a function call ' }}
    {{- 'with its proper arguments that best answers the given prompt.\\n\\n' }}
    {{- 'ASK_JSON' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + '\\n\\n' }}
    {%- endfor %}
    {{- messages[0]['content'] | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message['tool_calls'] %}
        {%- if message['tool_calls'] | length != 1 %}
            {{- raise_exception('tool_calls: got ' ~ message['tool_calls'] | length ~ '; allowed: 1 per message') }}
        {%- endif %}
        {%- set call = message['tool_calls'][0]['function'] %}
        {%- generation %}
            {{- '{"name": "' + call['name'] + '", "parameters": ' + call['arguments'] | tojson + '}<|eot_id|>' }}
        {%- endgeneration %}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- elif role == 'ipython' %}
        {{- message['content'] | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""".replace("ASK_JSON", _ASK_JSON)

_DATE = """{%- if not date_string is defined %}
    {%- set date_string = TODAY %}
{%- endif %}"""
LLAMA_3_1 = _LLAMA.replace("DATE", _DATE.replace("TODAY", "'26 Jul 2024'"))
# Llama 3.2 writes the day of the call; give date_string to `apply_chat_template` for the same text every day.
LLAMA_3_2 = _LLAMA.replace(
    "DATE", _DATE.replace("TODAY", "strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024'")
)

_QWEN_HEAD = """{%- set first = messages[0]['content'] if messages and messages[0]['role'] == 'system' else DEFAULT %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if first is not none %}
        {{- first + GAP }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": ' }}
    {{- '<args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif first is not none %}
    {{- '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}
{%- endif %}
"""
_QWEN_TURNS = """{%- for message in messages %}
    {%- set content = message['content'] if message['content'] is string else '' %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            ANSWER
            {%- for call in message['tool_calls'] or [] %}
                {%- set call = call['function'] or call %}
                {%- if content or not loop.first %}
                    {{- '\\n' }}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' + call['name'] + '", "arguments": ' }}
                {{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message['role'] == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message['role'] != 'system' or not loop.first %}
        {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\nPROMPT' }}
{%- endif %}"""
_QWEN_DEFAULT = "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"

QWEN_2_5 = _QWEN_HEAD.replace("DEFAULT", _QWEN_DEFAULT).replace("GAP", "'\\n\\n'") + _QWEN_TURNS.replace(
    "ANSWER", "{{- content }}"
).replace("PROMPT", "")
_QWEN_3_HEAD = _QWEN_HEAD.replace("DEFAULT", "none").replace("GAP", "'\\n\\n'")
QWEN_3_INSTRUCT = _QWEN_3_HEAD + _QWEN_TURNS.replace("ANSWER", "{{- content }}").replace("PROMPT", "")

# The reasoning of an answer is written only after the user's last question; the last answer always has a place for it.
_LAST_QUESTION = """{%- set asked = namespace(last=messages | length - 1, open=true) %}
{%- for message in messages | reverse %}
    {%- if asked.open and message['role'] == 'user' and message['content'] is string and not
        (message['content'].startswith('<tool_response>') and message['content'].endswith('</tool_response>')) %}
        {%- set asked.open = false %}
        {%- set asked.last = messages | length - loop.index %}
    {%- endif %}
{%- endfor %}
"""
_REASONED = """{%- set reasoning = message['reasoning_content'] if message['reasoning_content'] is string else '' %}
            {%- if not message['reasoning_content'] is string and '</think>' in content %}
                {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
            {%- if loop.index0 > asked.last and (loop.last or reasoning) %}
                {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- content }}
            {%- endif %}"""
_QWEN_3 = _QWEN_3_HEAD + _LAST_QUESTION + _QWEN_TURNS.replace("ANSWER", _REASONED)
QWEN_3 = _QWEN_3.replace(
    "PROMPT", "' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '') + '"
)
QWEN_3_THINKING = _QWEN_3.replace("PROMPT", "<think>\\n")
