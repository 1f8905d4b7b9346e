#!/usr/bin/env bash
# Every tool that is installed here reads what qzo writes. By hand, in an environment with the tools and
# `pip install -e '.[test]'`.
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in compressed_tensors hqq gptqmodel bitsandbytes aqlm diffusers; do
    if python -c "import $tool" 2>/dev/null; then
        python -m "tests.interop.$tool"
    else
        echo "$tool is not installed here: not checked"
    fi
done
