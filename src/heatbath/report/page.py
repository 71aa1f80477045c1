from heatbath.run import Run
def write_report(run): return {}
