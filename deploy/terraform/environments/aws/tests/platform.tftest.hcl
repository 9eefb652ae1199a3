# Plans with a mocked provider: no account is asked. terraform test, after terraform init -backend=false.
mock_provider "aws" {
  mock_resource "aws_eks_cluster" {
    defaults = {
      arn      = "arn:aws:eks:eu-central-1:111122223333:cluster/neuroloop"
      identity = [{ oidc = [{ issuer = "https://oidc.example.org/id/ABC" }] }]
    }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::111122223333:role/mocked" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-0000-0000-000000000000" }
  }
  mock_resource "aws_iam_openid_connect_provider" {
    defaults = { arn = "arn:aws:iam::111122223333:oidc-provider/oidc.example.org/id/ABC" }
  }
  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
  }
}

variables {
  bucket_prefix = "example-org"
}

run "the_api_cannot_write_models_and_the_trainer_cannot_read_logs" {
  command = apply

  assert {
    condition = alltrue([
      for statement in output.platform.policies["api"].Statement : !anytrue([for resource in statement.Resource : strcontains(resource, "mlflow")])
    ])
    error_message = "the API's identity reaches models"
  }
  assert {
    condition = alltrue([
      for statement in output.platform.policies["trainer"].Statement : !anytrue([
        for resource in statement.Resource : endswith(resource, "ImageLogs/*") || endswith(resource, "ImageLogsForInvalidImages/*")
      ])
    ])
    error_message = "the trainer's identity reaches the prediction logs"
  }
  assert {
    condition = alltrue(flatten([
      for identity, policy in output.platform.policies : [
        for statement in policy.Statement : [
          for resource in statement.Resource : resource == "arn:aws:s3:::example-org-neuroloop-store" ? statement.Sid == "list" : endswith(resource, "/*")
        ]
      ]
    ]))
    error_message = "a right reaches beyond a prefix"
  }
  assert {
    condition     = toset(keys(output.platform.identities)) == toset(["api", "trainer", "mlflow", "housekeeper", "backup"])
    error_message = "not one role a service account"
  }
  assert {
    condition = alltrue([
      for statement in output.platform.policies["backup"].Statement : contains(["read", "list"], statement.Sid)
    ])
    error_message = "the backup's identity can change the store"
  }
  assert {
    condition = {
      for identity, policy in output.platform.policies : identity => anytrue([for statement in policy.Statement : statement.Sid == "list" && can(statement.Condition)])
    } == { api = true, trainer = true, mlflow = true, housekeeper = true, backup = false }
    error_message = "not the backup alone may list without a prefix"
  }
  assert {
    condition     = output.platform.backups_url == "s3://example-org-neuroloop-store-backups"
    error_message = "the backups' address is ${output.platform.backups_url}"
  }
  assert {
    condition     = output.platform.store_url == "s3://example-org-neuroloop-store"
    error_message = "the store's address is ${output.platform.store_url}"
  }
}

run "one_zone_is_refused" {
  command = plan
  variables {
    zones = ["eu-central-1a"]
  }
  expect_failures = [var.zones]
}
