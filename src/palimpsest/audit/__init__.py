"""The methods of the verb 'audit'."""

from palimpsest.audit.cbod import CBOD
from palimpsest.audit.conceptvectors import ConceptVectors
from palimpsest.audit.muse import Course, Muse
from palimpsest.audit.sok_unlearning import RemovalOrSuppression
from palimpsest.audit.stopping import stop_when_forgotten
from palimpsest.audit.ununlearning import UnUnlearning

__all__ = ["CBOD", "ConceptVectors", "Course", "Muse", "RemovalOrSuppression", "UnUnlearning", "stop_when_forgotten"]
