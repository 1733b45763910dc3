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
  states) # masked tokens, and the teacher of the pooled row
    trunk states --seed 1 --muon --learning-rate 3e-3 --critic-start 1 --mask-shares 0.15 0.35 \
      --teacher "$out/teacher.safetensors" --teacher-weight 5 --epochs "${EPOCHS:-0.65}"
    ;;
  trunk) # and the critic
    trunk trunk --base "$out/states" --seed 2 --muon --learning-rate 2e-3 --critic-start 0 \
      --critic-alpha 10 --mask-shares 0.1 0.25 \
      --teacher "$out/teacher.safetensors" --teacher-weight 5 --epochs "${EPOCHS:-0.36}"
    ;;
  supersense) adapter $1 --objective classify --batch-tokens 2048 --epochs "${EPOCHS:-4}" ;;
  era)
    adapter $1 --objective classify --learning-rate 1.5e-3 --dropout 0.1 --epochs "${EPOCHS:-1.4}"
    ;;
  verses)
    adapter $1 --objective pairs --fields kjv,web --batch-tokens 8192 --epochs "${EPOCHS:-1}"
    ;;
  translators)
    adapter $1 --objective tokens --fields kjv,added --batch-tokens 2048 --epochs "${EPOCHS:-1}"
    ;;
  scripture) adapter $1 --objective masked --critic-start 1 --epochs "${EPOCHS:-0.3}" ;;
  *) echo "no step $1" >&2 && exit 2 ;;
  esac
}
mkdir -p "$out/adapters" "$out/runs"
for name in ${*:-tasks teacher states trunk supersense era verses translators scripture}; do
  step "$name"
done
