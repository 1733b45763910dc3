{{- define "trunkline.name" -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "trunkline.selector" -}}
app.kubernetes.io/name: trunkline
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "trunkline.labels" -}}
{{ include "trunkline.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* The pod, the same in a Deployment and in a StatefulSet. */}}
{{- define "trunkline.pod" -}}
metadata:
  labels:
    {{- include "trunkline.labels" . | nindent 4 }}
  {{- if .Values.metrics.annotations }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: "8000"
    prometheus.io/path: /metrics
  {{- end }}
spec:
  terminationGracePeriodSeconds: {{ add .Values.drain.preStopSeconds .Values.drain.windowSeconds .Values.drain.requestSeconds 5 }}
  automountServiceAccountToken: false
  enableServiceLinks: false # a Service called trunkline would set TRUNKLINE_PORT=tcp://...
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- if .Values.gpu.count }}
  {{- with .Values.gpu.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.gpu.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  containers:
    - name: trunkline
      image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args:
        - serve
        {{- if .Values.backbone.existingClaim }}
        - {{ printf "/backbone/%s" .Values.backbone.path | trimSuffix "/" | quote }}
        {{- end }}
        {{- range .Values.args }}
        - {{ . | quote }}
        {{- end }}
      env:
        - name: TRUNKLINE_DRAIN_WINDOW_S
          value: {{ .Values.drain.windowSeconds | quote }}
        {{- range $name, $value := .Values.settings }}
        - name: {{ printf "TRUNKLINE_%s" ($name | upper) }}
          value: {{ $value | toJson | trimAll "\"" | quote }}
        {{- end }}
        {{- with .Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: http, containerPort: 8000}
      startupProbe:
        httpGet: {path: /ready, port: http}
        periodSeconds: 2
        failureThreshold: 150
      livenessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: 4
      readinessProbe:
        httpGet: {path: /ready, port: http}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 1
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ .Values.drain.preStopSeconds | quote }}]
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      resources:
        {{- $resources := deepCopy .Values.resources }}
        {{- if .Values.gpu.count }}
        {{- $resources = merge $resources (dict "limits" (dict "nvidia.com/gpu" .Values.gpu.count)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: data, mountPath: /data}
        - {name: tmp, mountPath: /tmp}
        {{- if .Values.backbone.existingClaim }}
        - {name: backbone, mountPath: /backbone, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if not .Values.registry.perPod }}
    - name: data
      persistentVolumeClaim:
        claimName: {{ .Values.registry.existingClaim | default (printf "%s-data" (include "trunkline.name" .)) }}
    {{- end }}
    {{- if .Values.backbone.existingClaim }}
    - name: backbone
      persistentVolumeClaim:
        claimName: {{ .Values.backbone.existingClaim }}
        readOnly: true
    {{- end }}
{{- end -}}

{{- define "trunkline.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .Values.registry.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.registry.size }}
{{- end -}}
