"""Memory and time, predicted from shapes before anything is allocated, and measured when it is."""

from lowdim.plan.forecasting import Forecast, affordable, forecast
from lowdim.plan.measuring import Measured, PeakMemory, measure
from lowdim.plan.tables import Touched, shows, table

__all__ = ["Forecast", "Measured", "PeakMemory", "Touched", "affordable", "forecast", "measure", "shows", "table"]
