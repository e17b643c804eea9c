"""Everything that can be measured about one model, and about what tuning did to it: `lowdim diagnose all`."""

from lowdim.jobs.diagnosis.layers import LayerDiagnosis, measure_layer
from lowdim.jobs.diagnosis.whole import Diagnosis, DiagnosisSettings, diagnose_all, write_diagnosis

__all__ = ["Diagnosis", "DiagnosisSettings", "LayerDiagnosis", "diagnose_all", "measure_layer", "write_diagnosis"]
