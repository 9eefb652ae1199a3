# Who may do what in the object store, as in neuroloop.core.rights; the modules of the clouds turn it into policies.
locals {
  # Identity -> prefix -> rights. The identities are the service accounts in Kubernetes.
  rights = {
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
      "logs/airflow/"                        = ["write"]
    }
    mlflow = {
      "mlflow/" = ["list", "read", "write", "delete"]
    }
    housekeeper = {
      "InferenceLogs/ImageLogs/"                 = ["list", "read", "delete"]
      "InferenceLogs/ImageLogsForInvalidImages/" = ["list", "read", "delete"]
      "InferenceLogs/ImageLogsWithFeedback/"     = ["list", "read", "write", "delete"]
      "runs/"                                    = ["list", "read", "delete"]
      "logs/airflow/"                            = ["write"]
    }
    backup = {
      "" = ["list", "read"] # all of it; each cloud's module lets it write to a bucket of its own
    }
  }
}

output "rights" {
  description = "Identity -> prefix of the store -> list, read, write, delete. All may list where nothing lies, to see that the store is there."
  value       = { for identity, rights in local.rights : identity => merge(rights, { "probe/" = ["list"] }) }
}
