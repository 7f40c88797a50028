{{- define "mizzen.fullname" -}}
{{- if contains "mizzen" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-mizzen" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Labels that never change, given (list root component). */ -}}
{{- define "mizzen.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: mizzen
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- /* Labels of everything, given (list root component). */ -}}
{{- define "mizzen.labels" -}}
{{- $root := index . 0 -}}
{{ include "mizzen.selector" . }}
app.kubernetes.io/part-of: mizzen
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}

{{- /* An image's full name, given (list root image). */ -}}
{{- define "mizzen.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository ($image.tag | default $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "mizzen.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "mizzen.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* What the pods of the operator and the gateway share, given (list root component values). */ -}}
{{- define "mizzen.pod" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := index . 2 -}}
serviceAccountName: {{ include "mizzen.fullname" $root }}-{{ $component }}
# Variables for every Service would come under our own prefix: the Service of the gateway alone
# sets MIZZEN_GATEWAY_PORT to an address.
enableServiceLinks: false
securityContext:
  {{- include "mizzen.podSecurity" $root | nindent 2 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "mizzen.selector" (list $root $component) | nindent 8 }}
{{- end -}}

{{- /* Rules the operator needs where its resources are. */ -}}
{{- define "mizzen.operatorRules" -}}
- apiGroups: [mizzen.dev]
  resources: [llmdeployments, finetunejobs]
  verbs: [get, list, watch]
- apiGroups: [mizzen.dev]
  resources: [llmdeployments/status, finetunejobs/status]
  verbs: [patch]
# Children block their owner's deletion; some clusters (OpenShift) ask for this right then.
- apiGroups: [mizzen.dev]
  resources: [llmdeployments/finalizers, finetunejobs/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods, services, configmaps]
  verbs: [get, list, watch, create, patch, delete]
# The readiness gate, which decides whether a pod gets requests.
- apiGroups: [""]
  resources: [pods/status]
  verbs: [patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
# The past revisions of a deployment, so that it can go back to one.
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get]
- apiGroups: [""]
  resources: [events]
  verbs: [get, create, patch]
# Whether another autoscaler drives a deployment that scales by itself.
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [list]
- apiGroups: [keda.sh]
  resources: [scaledobjects]
  verbs: [list]
# What Kueue says of jobs that wait in one of its queues.
- apiGroups: [kueue.x-k8s.io]
  resources: [localqueues, workloads]
  verbs: [get]
# The optional way through the cluster's Gateway API; also to remove what an earlier setting made.
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  verbs: [get, list, create, patch, delete]
- apiGroups: [inference.networking.k8s.io]
  resources: [inferencepools]
  verbs: [get, list, create, patch, delete]
# Its own token, copied to where the pods are. No other Secret can be read.
- apiGroups: [""]
  resources: [secrets]
  resourceNames: [mizzen-admin]
  verbs: [get, create, patch, delete]
{{- end -}}

{{- /* Rules the gateway needs where models are served. */ -}}
{{- define "mizzen.gatewayRules" -}}
# patch is for one annotation: the policy gateway-wake refuses anything else.
- apiGroups: [mizzen.dev]
  resources: [llmdeployments]
  verbs: [list, watch, patch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
{{- end -}}
