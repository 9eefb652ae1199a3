# Who may do what in the object store, as in neuroloop.core.rights; the modules of the clouds turn it into policies.
output "rights" {
  description = "Identity -> prefix of the store -> list, read, write, delete. Its keys are the names of the service accounts in Kubernetes."
  value = {
    api = {
      "InferenceLogs/ImageLogs/"                 = ["read", "write", "delete"]
      "InferenceLogs/ImageLogsForInvalidImages/" = ["read", "write", "delete"]
      "InferenceLogs/ImageLogsWithFeedback/"     = ["list", "read", "write", "delete"]
      "retraining/batches/"                      = ["list", "read"]
      "data/versions/"                           = ["read"]
      "mail/"                                    = ["list", "read"]
    }
    trainer = {
      "data/"                                = ["list", "read", "write"]
      "runs/"                                = ["list", "read", "write", "delete"]
      "retraining/batches/"                  = ["list", "read", "write"]
      "InferenceLogs/ImageLogsWithFeedback/" = ["list", "read"]
    }
    mlflow = {
      "mlflow/" = ["list", "read", "write", "delete"]
    }
    housekeeper = {
      "InferenceLogs/ImageLogs/"                 = ["list", "read", "delete"]
      "InferenceLogs/ImageLogsForInvalidImages/" = ["list", "read", "delete"]
      "InferenceLogs/ImageLogsWithFeedback/"     = ["list", "read", "write", "delete"]
    }
  }
}
