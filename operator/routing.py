"""From an object to the resources that must look at it. Pure.

The one place that knows which label or field points from one object to another.
"""

from collections.abc import Iterable

from mizzen.operator.crds import finetunejob, llmdeployment
from mizzen.operator.crds.common import API_VERSION, GROUP
from mizzen.operator.engine.key import Key
from mizzen.operator.kube.documents import Json, Ref, labels_of
from mizzen.operator.kube.store import Store

DEPLOYMENT = "llmdeployment"
JOB = "finetunejob"

DEPLOYMENT_LABEL = f"{GROUP}/deployment"
RANKS_LABEL = f"{GROUP}/ranks-of"
JOB_LABEL = f"{GROUP}/job"
CHILD_SELECTOR = "app.kubernetes.io/managed-by=mizzen-operator"

_CRD_KINDS = {DEPLOYMENT: llmdeployment.KIND, JOB: finetunejob.KIND}

# Index: the FineTuneJobs whose result a deployment serves, by the deployment's name.
PROMOTES_TO = "promotes-to"
# Index: the FineTuneJobs that start from a deployment's model, by the deployment's name.
STARTS_FROM = "starts-from"


def ref_of(key: Key) -> Ref:
    """Return the name of the key's resource."""
    return Ref(API_VERSION, _CRD_KINDS[key.kind], key.namespace, key.name)


def route(document: Json) -> Iterable[Key]:
    """Yield the keys to look at when this object changes; the object's own or owner's first."""
    namespace = document["metadata"].get("namespace") or ""
    if document["kind"] == llmdeployment.KIND:
        yield Key(DEPLOYMENT, namespace, document["metadata"]["name"])
    elif document["kind"] == finetunejob.KIND:
        yield Key(JOB, namespace, document["metadata"]["name"])
        for target in promotes_to(document):
            yield Key(DEPLOYMENT, namespace, target)
    else:
        labels = labels_of(document)
        if deployment := labels.get(DEPLOYMENT_LABEL) or labels.get(RANKS_LABEL):
            yield Key(DEPLOYMENT, namespace, deployment)
        if job := labels.get(JOB_LABEL):
            yield Key(JOB, namespace, job)


def promotes_to(job: Json) -> Iterable[str]:
    """Yield the deployment that shall serve the job's result, if any."""
    promotion = (job.get("spec") or {}).get("promotion") or {}
    if promotion.get("strategy") != "None" and promotion.get("deployment"):
        yield promotion["deployment"]


def starts_from(job: Json) -> Iterable[str]:
    """Yield the deployment whose model the job starts from, if any."""
    base = (job.get("spec") or {}).get("baseModel") or {}
    if base.get("deployment"):
        yield base["deployment"]


INDEXES = {
    (finetunejob.KIND, PROMOTES_TO): promotes_to,
    (finetunejob.KIND, STARTS_FROM): starts_from,
}


def neighbours(resource: Json, store: Store) -> Iterable[Key]:
    """Yield the other resources that read this one's status."""
    namespace = resource["metadata"].get("namespace") or ""
    name = resource["metadata"]["name"]
    if resource["kind"] == llmdeployment.KIND:
        for index in (PROMOTES_TO, STARTS_FROM):
            for job in store.lookup(finetunejob.KIND, index, namespace, name):
                yield Key(JOB, namespace, job["metadata"]["name"])
    elif resource["kind"] == finetunejob.KIND:
        for deployment in promotes_to(resource):
            yield Key(DEPLOYMENT, namespace, deployment)
