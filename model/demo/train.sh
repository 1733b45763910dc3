#!/bin/sh
# train.sh DATA OUT [STEP...]: tasks, teacher, trunk and adapter sets from the files of build.py.
# Each step goes on from its last checkpoint when run again, and is passed over once its file is
# there. One thread: a second one waits at the barriers of small matrices most of the time.
set -eu
data=$1 out=$2
shift 2
bin=${BIN:-.venv/bin}
train() { "$bin/trunkline" train "$@" --threads 1 --checkpoint-every 50; }
trunk() {
  name=$1
  shift
  [ -e "$out/$name/backbone.safetensors" ] || train trunk "$out/tasks/corpus.txt" \
    --out "$out/$name" --run "$out/runs/$name" --block-size 512 "$@"
}
adapter() {
  name=$1
  shift
  [ -e "$out/adapters/$name.safetensors" ] ||
    train adapter "$out/trunk" "$out/tasks/${name}_train.jsonl" \
      --test "$out/tasks/${name}_test.jsonl" --out "$out/adapters/$name.safetensors" \
      --run "$out/runs/$name" --seed 1 --learning-rate 2e-3 "$@"
}
step() {
  case $1 in
  tasks) [ -e "$out/tasks/corpus.txt" ] || "$bin/python" -m model.demo.tasks "$data" "$out/tasks" ;;
  teacher)
    [ -e "$out/teacher.safetensors" ] || "$bin/python" -m model.demo.teacher \
      "$out/tasks/corpus.txt" "$out/teacher.safetensors" --threads 1
    ;;
  masked) # masked tokens, then its critic
    trunk masked --seed 1 --learning-rate 1.5e-3 --critic-start 0.6 --epochs "${EPOCHS:-2.2}"
    ;;
  trunk) # and the teacher of the pooled row
    trunk trunk --base "$out/masked" --seed 2 --learning-rate 1e-3 \
      --teacher "$out/teacher.safetensors" --teacher-weight 5 --mask-shares 0.1 0.3 \
      --critic-alpha 2 --critic-start 0.3 --epochs "${EPOCHS:-0.165}"
    ;;
  supersense) adapter $1 --objective classify --batch-tokens 2048 --epochs "${EPOCHS:-1.2}" ;;
  era) adapter $1 --objective classify --epochs "${EPOCHS:-0.2}" ;;
  verses)
    adapter $1 --objective pairs --fields kjv,web --batch-tokens 8192 --epochs "${EPOCHS:-0.35}"
    ;;
  translators)
    adapter $1 --objective tokens --fields kjv,added --batch-tokens 2048 --epochs "${EPOCHS:-0.35}"
    ;;
  scripture) adapter $1 --objective masked --critic-start 1 --epochs "${EPOCHS:-0.15}" ;;
  *) echo "no step $1" >&2 && exit 2 ;;
  esac
}
mkdir -p "$out/adapters" "$out/runs"
for name in ${*:-tasks teacher masked trunk supersense era verses translators scripture}; do
  step "$name"
done
