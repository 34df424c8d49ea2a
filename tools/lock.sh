#!/usr/bin/env bash
# Refreshes tools/locks/cpu-py311.txt: installs the project with its development tools into an empty
# virtual environment, checks that no CUDA package came in, and writes down every version.
#
#   tools/lock.sh          from pyproject.toml alone (newer versions of what it does not pin)
#   tools/lock.sh --keep   with the present lock as constraints (after a change of pyproject.toml)
#
# pip's own settings say where packages come from; PYTHON names the interpreter (default python3.11).
set -euo pipefail
cd "$(dirname "$0")/.."
lock=tools/locks/cpu-py311.txt

constraints=()
case "${1-}" in
    "") ;;
    --keep) constraints=(-c "$lock") ;;
    *) sed -n '2,8p' "$0"; [ "$1" = --help ]; exit ;;
esac

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder"
"$folder/bin/pip" install --quiet "${constraints[@]}" -e ".[dev]"
"$folder/bin/pip" check
cuda=$("$folder/bin/python" -c "import torch; print(torch.version.cuda or '')")
if [ -n "$cuda" ]; then
    echo "lock.sh: pip chose the CUDA $cuda build of torch; let pip find a CPU build (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL) and run again" >&2
    exit 1
fi
{
    echo "# Versions that the tests run with: Python 3.11, torch's CPU build. Written by tools/lock.sh."
    echo "# torch's local label (+cpu) is left off, so that the lock also fits an index that names the build otherwise."
    "$folder/bin/pip" freeze --exclude-editable | sed 's/+cpu$//'
} > "$folder/lock"
mv "$folder/lock" "$lock"
echo "wrote $lock: $(grep -vc '^#' "$lock") packages"
